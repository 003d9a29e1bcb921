"""The short convolution in front of a scan, against loops."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from scan_cases import BACKENDS, error, lay_out, make_routes
from torch import nn

from ssmvision.ops import causal_conv1d

SIZES = [(1, 1, 1, 1), (2, 3, 5, 4), (1, 5, 2, 4), (2, 17, 70, 3), (1, 8, 129, 2)]  # b, d, l, width


def make(b, d, l, width, k=0, bias=True, routes="", seed=0):
    torch.manual_seed(seed)
    routed = (k,) if k else ()
    x, weight = torch.randn(b, d, l), torch.randn(*routed, d, width)
    return x, weight, torch.randn(*routed, d) if bias else None, make_routes(routes, k or 1, l) if routes else None


def naive(x, weight, bias, silu, routes, reset=None):
    """One number at a time, in the caller's shapes."""
    if weight.dim() == 2:
        return naive(x, weight[None], None if bias is None else bias[None], silu, routes, reset)[:, 0]
    (b, d, l), (k, _, width) = x.shape, weight.shape
    y = torch.zeros(b, k, d, l, dtype=torch.float64)
    for ib in range(b):
        for ik in range(k):
            route = range(l) if routes is None else routes[ik].tolist()
            for i in range(d):
                for t, token in enumerate(route):
                    value = 0.0 if bias is None else bias[ik, i].item()
                    for j in reversed(range(max(0, width - 1 - t), width)):
                        value += weight[ik, i, j].item() * x[ib, i, route[t - width + 1 + j]].item()
                        if reset is not None and reset[(ib, *[ik] * (reset.dim() - 2), route[t - width + 1 + j])]:
                            break
                    y[ib, ik, i, token] = value / (1 + math.exp(-value)) if silu else value
    return y


def explicit(x, weight, bias, silu, routes):
    """The same with whole tensors, differentiable."""
    if weight.dim() == 2:
        return explicit(x, weight[None], None if bias is None else bias[None], silu, routes)[:, 0]
    k, width, l = weight.shape[0], weight.shape[-1], x.shape[-1]
    outputs = []
    for ik in range(k):
        route = torch.arange(l) if routes is None else routes[ik]
        padded = torch.cat([x.new_zeros(*x.shape[:-1], width - 1), x[..., route]], -1)
        y = sum(weight[ik, :, j, None] * padded[..., j : j + l] for j in range(width))
        y = y if bias is None else y + bias[ik, :, None]
        outputs.append(torch.zeros_like(y).index_copy(-1, route, y * torch.sigmoid(y) if silu else y))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pass(backend, sizes, bias, silu):
    x, weight, bias, _ = make(*sizes, bias=bias)
    y = causal_conv1d(x, weight, bias, silu, backend=backend)
    assert y.shape == x.shape
    assert error(y, naive(x, weight, bias, silu, None)) < 2e-6


@pytest.mark.parametrize("routes", ["", "random", "bidirectional", "cross", "window"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_routes(backend, routes, silu):
    x, weight, bias, order = make(2, 5, 12, 4, k=4, routes=routes)
    y = causal_conv1d(x, weight, bias, silu, order, backend=backend)
    assert y.shape == (2, 4, 5, 12)
    assert error(y, naive(x, weight, bias, silu, order)) < 2e-6


@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, sizes, silu, k, layout):
    x, weight, bias, order = make(*sizes, k=k, routes="random" if k else "")
    results = []
    for convolve, dtype in ((explicit, torch.float64), (partial(causal_conv1d, backend=backend), torch.float32)):
        inputs = [lay_out(t.to(dtype), layout).detach().requires_grad_() for t in (x, weight, bias)]
        y = convolve(*inputs, silu, routes=order)
        torch.manual_seed(1)
        results.append(
            [y, *torch.autograd.grad((y.double() * torch.randn(y.shape, dtype=torch.float64)).sum(), inputs)]
        )
    for wanted, found, limit in zip(*results, (2e-6, 5e-6, 5e-6, 5e-6), strict=True):
        assert found.shape == wanted.shape
        assert error(found, wanted) < limit


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("tokens", ["random", "every", (0,), (63,), (64,), (65, 66, 128)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reset(backend, tokens, k):
    x, weight, bias, order = make(2, 3, 130, 4, k=k, routes="random" if k else "")
    reset = torch.rand(2, *([k] if k else []), 130) < 0.3
    if tokens != "random":
        reset = torch.full((2, 130), tokens == "every")
        reset[:, [] if tokens == "every" else list(tokens)] = True
    y = causal_conv1d(x, weight, bias, True, order, reset, backend=backend)
    assert error(y, naive(x, weight, bias, True, order, reset)) < 2e-6


@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_resets(backend, layout):
    x, weight, bias, order = make(2, 20, 70, 3, k=2, routes="random")
    reset = lay_out(torch.rand(2, 2, 70) < 0.2, layout)

    def gradients(dtype, backend):
        inputs = [lay_out(t.to(dtype), layout).detach().requires_grad_() for t in (x, weight, bias)]
        y = causal_conv1d(*inputs, True, order, reset, backend=backend)
        torch.manual_seed(1)
        return torch.autograd.grad((y.double() * torch.randn(y.shape, dtype=torch.float64)).sum(), inputs)

    for found, wanted in zip(gradients(torch.float32, backend), gradients(torch.float64, "reference"), strict=True):
        assert error(found, wanted) < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend):
    x, weight, bias, _ = make(1, 3, 20, 4)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[:, [5, 7]] = True
    packed = causal_conv1d(x, weight, bias, True, reset=reset, backend=backend)
    alone = [causal_conv1d(part, weight, bias, True, backend=backend) for part in x.split([5, 2, 13], -1)]
    assert torch.equal(packed, torch.cat(alone, -1))
    x[..., 6] = torch.nan
    poisoned = causal_conv1d(x, weight, bias, True, reset=reset, backend=backend).isnan().any(1)[0]
    assert poisoned.nonzero().flatten().tolist() == [6]


def test_wrong_resets_are_told():
    x, weight, bias, order = make(2, 3, 12, 4, k=2, routes="random")
    with pytest.raises(RuntimeError, match=r"causal_conv1d: reset has shape \(2, 3, 12\), expected \(2, 2, 12\)"):
        causal_conv1d(x, weight, bias, True, order, torch.zeros(2, 3, 12, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="reset must be bool, not"):
        causal_conv1d(x, weight, bias, True, order, torch.zeros(2, 12))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 3, 0)], ids=str)
def test_nothing_to_convolve(shape):
    assert causal_conv1d(torch.zeros(shape), torch.zeros(3, 4)).shape == shape


# In a process of its own: a kernel that follows such a route reads beyond its tensors.
BAD_ROUTES = """
import torch
from ssmvision.ops import causal_conv1d
for routes in (torch.arange(64)[None].int(), torch.arange(64)[None] + 1, torch.arange(64)[None] - (1 << 40)):
    try:
        causal_conv1d(torch.zeros(1, 3, 64), torch.zeros(1, 3, 4), None, True, routes, backend="cpu")
    except (RuntimeError, IndexError, ValueError) as error:
        print("refused:", error)
"""


def test_routes_are_int64_and_in_range():
    done = subprocess.run([sys.executable, "-c", BAD_ROUTES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
    assert done.stdout.count("refused:") == 3, done.stdout


@pytest.mark.parametrize("index", [0, 1, 2])
def test_wrong_shapes_are_named(index):
    arguments = list(make(1, 3, 12, 4, k=2, routes="random"))
    arguments[index] = torch.zeros(*arguments[index].shape[:-1], 99)[:, :2] if index != 1 else torch.zeros(2, 4, 3)
    with pytest.raises(RuntimeError, match=r"causal_conv1d: \w+ has shape .* expected "):
        causal_conv1d(*arguments[:3], True, arguments[3])


def test_step_under_autocast():
    x, weight, bias, order = make(1, 3, 12, 4, k=2, routes="random")
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    outside = torch.autograd.grad(causal_conv1d(*inputs, True, order).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(causal_conv1d(*inputs, True, order).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_later_tokens_do_not_reach_earlier_ones():
    x, weight, bias, order = make(1, 3, 12, 4, k=2, routes="bidirectional")
    changed = x.clone()
    changed[..., 6] += 1
    moved = (causal_conv1d(changed, weight, bias, True, order) != causal_conv1d(x, weight, bias, True, order)).any(2)[0]
    assert moved[0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert moved[1].nonzero().flatten().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("k", [0, 2])
def test_gradcheck(k):
    x, weight, bias, order = make(1, 2, 6, 3, k=k, routes="random" if k else "")
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    for reset in (None, torch.arange(6)[None] == 3):
        convolve = partial(lambda reset, *t: causal_conv1d(*t, True, order, reset), reset)
        assert torch.autograd.gradcheck(convolve, inputs)
        assert torch.autograd.gradgradcheck(convolve, inputs)


@pytest.mark.parametrize("k", [0, 2])
def test_second_derivatives_in_float32(k):
    x, weight, bias, order = make(1, 2, 6, 3, k=k, routes="random" if k else "")

    def penalty(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        grads = torch.autograd.grad(causal_conv1d(*inputs, True, order).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for found, wanted in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, weight, bias, order = (
        t.to(dtype) if t.is_floating_point() else t for t in make(2, 5, 12, 4, k=2, routes="random")
    )
    y = causal_conv1d(x, weight, bias, True, order)
    assert y.dtype == dtype
    assert error(y, naive(x.double(), weight.double(), bias.double(), True, order)) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("k", [0, 2])
def test_opcheck(k):
    x, weight, bias, order = make(2, 3, 8, 4, k=k, routes="random" if k else "")
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    for reset in (None, torch.rand(2, 8) < 0.3):
        torch.library.opcheck(torch.ops.ssmvision.causal_conv1d.default, (*inputs, True, order, reset))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))
        self.bias = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        return causal_conv1d(x, self.weight, self.bias, True, routes)


def inputs(b=2, l=9):
    steps = torch.arange(l)
    return torch.randn(b, 3, l), torch.stack([steps, steps.flip(0)])


def test_script_and_trace():
    module, given = Convolution(), inputs()
    traced = torch.fx.symbolic_trace(module)
    for f in (torch.jit.script(module), traced, torch.jit.script(traced)):
        torch.testing.assert_close(f(*given), module(*given))


def test_export_with_dynamic_batch_and_length():
    module = Convolution()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    program = torch.export.export(module, inputs(), dynamic_shapes=({0: batch, 2: length}, {1: length}))
    for sizes in [(2, 9), (1, 5), (3, 130)]:
        given = inputs(*sizes)
        torch.testing.assert_close(program.module()(*given), module(*given))


def test_compile():
    torch._dynamo.reset()
    module, given = Convolution(), inputs()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(*given), module(*given))


def test_meta_device():
    given = [x.to("meta") for x in inputs()]
    assert Convolution().to("meta")(*given).shape == (2, 2, 3, 9)
