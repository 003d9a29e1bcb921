"""Tokens that follow a scan do what the theory says in one dimension, and what the layer computes in many."""

import math

import pytest
import torch

from ssmvision import create_model
from ssmvision.engine.inspection.scans import watch_scans
from ssmvision.engine.inspection.token_flow import REGIMES, NothingToDiagnose, Scan, find_scans, follow
from ssmvision.layers import Mamba2

CONVERGENT, SLOW, FAST = REGIMES


def one_dimensional(mu, s_delta, tokens=(0.3, 0.5, 1.0, 0.7)):
    """B = u, C = mu u, delta = softplus(s_delta u), A = -1."""
    x_proj = torch.tensor([[[s_delta], [1.0], [mu]]])
    one = torch.ones(1, 1, 1)
    return Scan("layer", torch.tensor(tokens).view(1, 1, 1, -1), x_proj, -one, one, None)


@pytest.mark.parametrize(
    ("mu", "s_delta", "regime"),
    [(-1.0, 1.0, CONVERGENT), (-1.0, -1.0, CONVERGENT), (1.0, -1.0, SLOW), (1.0, 0.0, FAST), (1.0, 1.0, FAST)],
)
def test_one_dimension(mu, s_delta, regime):
    flow = follow(one_dimensional(mu, s_delta))
    assert flow.regimes() == [[regime]]
    assert flow.growing.item() == (mu > 0)


def test_growth_is_as_fast_as_the_theory_says():
    """u' = u^3 with a constant step size, u' ~ u^4 where it grows with u, and u' ~ u^3 exp(-u) where it shrinks."""
    exponents = [follow(one_dimensional(1.0, s)).exponents().item() for s in (0.0, 1.0, -1.0)]
    assert exponents[0] == pytest.approx(2, abs=0.2)
    assert exponents[1] == pytest.approx(3, abs=0.3)
    assert exponents[2] < 0
    # Of one token, u' = ln(2) u^3 from 1 is solved by (1 - 2 ln(2) t)^-1/2: a time unit, norm / speed, is 1 / ln(2).
    flow = follow(one_dimensional(1.0, 0.0, (1.0,)))
    assert flow.times[-1].item() == pytest.approx(0.5, rel=0.03)
    flow = follow(one_dimensional(-1.0, 0.0, (1.0,)))
    wanted = (1 + 2 * flow.times) ** -0.5
    torch.testing.assert_close(flow.norms.double(), wanted, rtol=0.03, atol=0)
    assert math.isnan(flow.exponents().item())


@pytest.mark.parametrize(
    "name", ["test_vim", "test_vmamba", "test_mambavision", "test_groupmamba", "test_localvim", "test_efficientvmamba"]
)
def test_velocity_is_what_the_layer_adds(name):
    torch.manual_seed(0)
    model, image = create_model(name).eval(), torch.randn(2, 3, 64, 64)
    scans, calls = find_scans(model, image), watch_scans(model, image)
    assert len(scans) == len(calls)
    for scan, call in zip(scans, calls, strict=True):
        assert scan.layer in dict(model.named_modules())
        y, routes = call.again(D=None, merge=False), call.arguments["routes"]
        velocity = scan.velocity(scan.u)
        for i in range(y.shape[1]):
            route = slice(None) if routes is None else routes[i]
            torch.testing.assert_close(velocity[:, i], y[:, i][:, :, route], rtol=1e-4, atol=1e-6)


def test_calls_in_turn_find_their_projections():
    """The layer of MSVMamba scans at full resolution with its second projection, then three times with its first."""
    torch.manual_seed(0)
    model = create_model("test_msvmamba").eval()
    scans = [scan for scan in find_scans(model, torch.randn(1, 3, 64, 64)) if scan.layer == "stages.0.blocks.0.op"]
    weights = model.stages[0].blocks[0].op.x_proj_weight
    assert [torch.equal(scan.x_proj, weights[i : i + 1]) for scan, i in zip(scans, (1, 0, 0, 0), strict=True)] == [
        True
    ] * 4


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_tied_rows_decides_at_once_where_step_sizes_are_constant(sign):
    torch.manual_seed(0)
    rows = torch.randn(1, 3, 6)
    x_proj = torch.cat([torch.zeros(1, 1, 6), rows, sign * rows], dim=1)
    A = -torch.rand(1, 6, 3) - 0.1
    scan = Scan("layer", torch.randn(50, 1, 6, 7), x_proj, A, torch.zeros(1, 6, 1), torch.randn(1, 6))
    assert (sign * follow(scan, steps=1).rates[0] > 0).all()


def test_definite_layers_go_one_way():
    torch.manual_seed(0)
    for input_output, regime in (("negative", CONVERGENT), ("positive", FAST)):
        model = create_model("test_vim", img_size=32, input_output=input_output).eval()
        for scan in find_scans(model, torch.randn(2, 3, 32, 32)):
            flow = follow(scan)
            assert flow.regimes() == [[regime] * 2] * 2
            assert (flow.growing == float(regime == FAST)).all()


def test_other_scans_are_named():
    with pytest.raises(NothingToDiagnose, match=r"Mamba2 has no selective scan.*: all it runs is ssd_scan\."):
        find_scans(Mamba2(8, headdim=4), torch.randn(1, 5, 8))
