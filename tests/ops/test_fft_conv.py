"""The long convolution against loops and against the recurrence that it stands for."""

import pytest
import torch
from scan_cases import error

from ssmvision.ops import fft_conv, linear_scan

SIZES = [(2, 3, 16, 16), (1, 2, 7, 7), (2, 1, 9, 4), (1, 2, 5, 12), (1, 1, 1, 1), (1, 2, 6, 1)]  # b, d, l, kernel


def naive(u, kernel, D=None, backward_kernel=None):
    """Term after term."""
    if kernel.dim() == 3:
        skips = [None] * len(kernel) if D is None else D
        backward = [None] * len(kernel) if backward_kernel is None else backward_kernel
        return torch.stack([naive(u, *parts) for parts in zip(kernel, skips, backward, strict=True)], 1)
    y = torch.zeros_like(u) if D is None else D[:, None] * u
    for t in range(u.shape[-1]):
        for s in range(u.shape[-1]):
            if 0 <= t - s < kernel.shape[-1]:
                y[..., t] += kernel[:, t - s] * u[..., s]
            if backward_kernel is not None and 0 <= s - t - 1 < backward_kernel.shape[-1]:
                y[..., t] += backward_kernel[:, s - t - 1] * u[..., s]
    return y


def make(b, d, l, length, outputs=(), bidirectional=False, skip=True, dtype=torch.float64):
    torch.manual_seed(0)
    u, kernel = torch.randn(b, d, l, dtype=dtype), torch.randn(*outputs, d, length, dtype=dtype)
    backward = torch.randn(*outputs, d, max(1, length - 1), dtype=dtype) if bidirectional else None
    return u, kernel, torch.randn(*outputs, d, dtype=dtype) if skip else None, backward


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("outputs", [(), (1,), (2,)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_loops(sizes, outputs, bidirectional, skip):
    arguments = make(*sizes, outputs, bidirectional, skip)
    wanted = naive(*arguments)
    y = fft_conv(*arguments)
    assert y.shape == wanted.shape == (sizes[0], *outputs, *sizes[1:3])
    assert error(y, wanted) < 1e-13
    assert error(fft_conv(*(None if t is None else t.float() for t in arguments)), wanted) < 2e-6


def test_a_diagonal_recurrence_is_a_convolution():
    a, u = torch.polar(torch.full((4,), 0.9), torch.arange(4.0)), torch.randn(2, 3, 50)
    kernel = 2 * (a[:, None] ** torch.arange(50)).sum(0).real.expand(3, 50)
    h, _ = linear_scan(a, u.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, 4))
    assert error(fft_conv(u, kernel), 2 * h.real.sum(-1).transpose(1, 2)) < 2e-6


@pytest.mark.parametrize("length", [3, 4])  # transforms of an odd and an even number of steps
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradcheck(bidirectional, length):
    inputs = [t.requires_grad_() for t in make(1, 2, 4, length, (2,), bidirectional) if t is not None]
    assert torch.autograd.gradcheck(fft_conv, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fft_conv, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_transforms_in_float32(dtype):
    arguments = [t.to(dtype) for t in make(2, 3, 33, 33, bidirectional=True)]
    y = fft_conv(*arguments)
    assert y.dtype == dtype
    assert error(y, naive(*(t.double() for t in arguments))) < torch.finfo(dtype).eps


def test_autocast_changes_nothing():
    inputs = [t.requires_grad_() for t in make(2, 3, 33, 33, bidirectional=True, dtype=torch.float32)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = fft_conv(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_later_tokens_do_not_reach_earlier_ones():
    u, kernel, _, _ = make(1, 2, 20, 20, dtype=torch.float32)
    changed = u.clone()
    changed[..., 10] += 1e4
    assert error(fft_conv(changed, kernel)[..., :10], fft_conv(u, kernel)[..., :10]) < 1e-2  # rounding at 1e4


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0)], ids=str)
def test_nothing_to_convolve(shape):
    assert fft_conv(torch.zeros(shape), torch.zeros(2, 5)).shape == shape


def test_compile():
    torch._dynamo.reset()
    u, kernel, D, backward = make(2, 3, 16, 40, bidirectional=True, dtype=torch.float32)
    compiled = torch.compile(fft_conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, kernel, D, backward), fft_conv(u, kernel, D, backward))


WRONG = [
    ((torch.zeros(3, 8), torch.zeros(3, 8)), r"u has shape \(3, 8\), expected \(b, d, l\)"),
    ((torch.zeros(1, 3, 8), torch.zeros(2, 8)), r"kernel has shape \(2, 8\), expected \(3, 8\)"),
    ((torch.zeros(1, 3, 8), torch.zeros(2, 3, 8), torch.zeros(3)), r"D has shape \(3,\), expected \(2, 3\)"),
    ((torch.zeros(1, 3, 8), torch.zeros(3, 8), None, torch.zeros(2, 3, 8)), "backward_kernel has shape"),
    ((torch.zeros(1, 3, 8), torch.zeros(3, 8) + 0j), "kernel must be real floating point, not torch.complex64"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_wrong_calls_are_told_in_one_line(arguments, message):
    with pytest.raises(RuntimeError, match=f"^fft_conv: {message}[^\n]*$"):
        fft_conv(*arguments)
