"""`convs5_step` in one native call is what torch's operators say one by one."""

import pytest
import torch

from ssmvision.ops import convs5_step, frame_conv_weight
from ssmvision.ops.cpu import convs5_step as backend
from ssmvision.ops.frame_norm import ACTIVATIONS
from ssmvision.ops.reference import convs5_step as reference

# pictures, channels, states, height, width, kernels of B, C and the feedthrough, groups
CASES = [
    (1, 32, 16, 8, 8, 3, 3, 3, 32),
    (2, 40, 5, 5, 7, 3, 1, 5, 8),
    (1, 6, 3, 1, 1, 1, 3, 3, 1),
    (3, 8, 33, 2, 19, 2, 4, 3, 4),
    (1, 64, 32, 16, 12, 3, 3, 3, 32),
]


def arguments(n, c, p, h, w, k_B, k_C, k_D, groups, dtype=torch.float32):
    torch.manual_seed(0)
    number = dtype.to_complex()

    def conv(o, i, k):
        return frame_conv_weight(torch.randn(o, i, k, k, dtype=dtype) / (i * k * k) ** 0.5)

    def vectors(count):
        return [torch.randn(c, dtype=dtype) for _ in range(count)]

    feedthrough = (*vectors(2), conv(c, c, k_D), *vectors(3), conv(c, c, k_D), *vectors(1))
    tensors = {
        "u": torch.randn(n, c, h, w, dtype=dtype), "state": torch.randn(n, p, h, w, dtype=number),
        "A": 0.9 * torch.randn(p, dtype=number).sgn(), "B": conv(2 * p, c, k_B), "C": conv(c, 2 * p, k_C),
    }  # fmt: skip
    return tensors, feedthrough, {"groups": groups, "eps": 1e-6}


def widened(tensors):
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return [t.to(wide[t.dtype]) for t in tensors]


@pytest.fixture
def native(monkeypatch):
    """How often the native kernel ran."""
    calls, direct = [], backend.direct
    monkeypatch.setattr(backend, "direct", lambda *args, **kw: calls.append(args) or direct(*args, **kw))
    return calls


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("behind", [False, True])
def test_it_is_what_torch_says(case, behind, activation, native, threads):
    tensors, feedthrough, options = arguments(*case)
    feedthrough = feedthrough if behind else ()
    y, state = convs5_step(**tensors, feedthrough=feedthrough, **options, activation=activation)
    code = ACTIVATIONS.index(activation)
    wanted = reference.definition(*widened(tensors.values()), tuple(widened(feedthrough)), *options.values(), code)
    assert len(native) == 1
    for found, exact in zip((y, state), wanted, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - exact).abs().max() <= 3e-6 * exact.abs().max()


def test_any_layout_gives_the_same():
    tensors, feedthrough, options = arguments(*CASES[1])
    y, state = convs5_step(**tensors, feedthrough=feedthrough, **options)
    slanted = {name: t.transpose(-1, -2).contiguous().transpose(-1, -2) for name, t in tensors.items() if t.dim() > 1}
    found = convs5_step(**{**tensors, **slanted}, feedthrough=feedthrough, **options)
    assert all(map(torch.equal, found, (y, state)))


def test_gradients_flow_where_they_are_wanted(native):
    tensors, feedthrough, options = arguments(*CASES[1])
    leaves = [t.requires_grad_() for t in (*tensors.values(), *feedthrough)]
    y, state = convs5_step(**tensors, feedthrough=feedthrough, **options, activation="gelu")
    gradients = torch.autograd.grad(y.square().sum() + state.abs().sum(), leaves)
    assert not native
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype, native):
    tensors, feedthrough, options = arguments(*CASES[0])
    if dtype == torch.float64:
        tensors, feedthrough, options = arguments(*CASES[0], dtype=torch.float64)
    else:  # the state stays complex64
        tensors["u"], feedthrough = tensors["u"].bfloat16(), tuple(t.bfloat16() for t in feedthrough)
    y, state = convs5_step(**tensors, feedthrough=feedthrough, **options)
    assert y.dtype == dtype
    assert state.dtype == tensors["state"].dtype
    assert not native


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("B", shape) for shape in ((3, 3, 4, 32), (3, 3, 32, 8), (3, 32))),
        *(("C", shape) for shape in ((3, 3, 32, 64), (3, 3, 32, 8))),
        ("state", (1, 16, 8, 4)),
        ("B", (0, 3, 32, 32)),
        ("A", (16, 2)),
        *((0, (4,)), (2, (3, 3, 8, 32)), (3, (4,)), (6, (3, 3, 32, 8))),
    ],
)
def test_shapes_that_do_not_fit_read_no_foreign_memory(name, shape):
    tensors, feedthrough, options = arguments(*CASES[0])
    if isinstance(name, int):
        feedthrough = (*feedthrough[:name], torch.randn(shape), *feedthrough[name + 1 :])
    else:
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    with pytest.raises(RuntimeError, match=r"has shape|holds nothing"):
        convs5_step(**tensors, feedthrough=feedthrough, **options)
