"""The form of the operators that is exported is their definition."""

import pytest
import torch
from scan_cases import Case, cast, make, random_case

from ssmvision.ops import causal_conv1d, linear_scan, routes, selective_scan, ssd_scan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def assert_exportable_matches(operator, *args, **kwargs):
    with torch.no_grad():
        found, wanted = (operator(*args, **kwargs, backend=backend) for backend in ("exportable", "reference"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [Case(), Case(k=2, routes="random"), *map(random_case, range(8))], ids=str)
def test_selective_scan(case):
    assert_exportable_matches(selective_scan, **cast(make(case), torch.float32))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("order", [None, routes.bidirectional(9)], ids=["one", "both"])
def test_causal_conv1d(order, reset):
    weight, bias = (torch.randn(2, 3, 4), torch.randn(2, 3)) if order is not None else (torch.randn(3, 4), None)
    flags = torch.rand(2, 9) < 0.3 if reset else None
    assert_exportable_matches(causal_conv1d, torch.randn(2, 3, 9), weight, bias, True, order, flags)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_linear_scan(dtype, reverse):
    a, x, start = 0.5 * torch.randn(4, 1, dtype=dtype), torch.randn(2, 9, 4, 3), torch.randn(2, 4, 3)
    assert_exportable_matches(linear_scan, a, x, start, torch.rand(2, 9) < 0.3, reverse)


@pytest.mark.parametrize("reset", [False, True])
def test_ssd_scan(reset):
    x, dt, A = torch.randn(2, 9, 4, 3), torch.rand(2, 9, 4), -torch.rand(4)
    B, C = torch.randn(2, 9, 2, 5), torch.randn(2, 9, 2, 5)
    flags = torch.rand(2, 9) < 0.3 if reset else None
    assert_exportable_matches(ssd_scan, x, dt, A, B, C, torch.randn(4), torch.randn_like(x), torch.randn(4), True,
                              reset=flags)  # fmt: skip
