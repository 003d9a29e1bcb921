"""One step at a time gives what the whole scan gives."""

import itertools
import random

import pytest
import torch
from scan_cases import error

from ssmvision.ops import (
    causal_conv1d,
    causal_conv1d_run,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
    ssd_scan,
    ssd_scan_step,
)

SEEDS = range(8)


def maybe(draw, *shape):
    return torch.randn(*shape) if draw.random() < 0.5 else None


def assert_same(stepped, whole):
    """Outputs by step and the final state, against those of the whole scan."""
    for found, wanted in zip(stepped, whole, strict=True):
        assert found.dtype == wanted.dtype
        pair = (torch.view_as_real(x) if x.is_complex() else x for x in (found, wanted))
        assert error(*pair) < 2e-6


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_selective_scan(seed, complex_):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    b, d, l = draw.randint(1, 3), draw.choice([1, 4, 6]), draw.randint(1, 70)
    n, rank = draw.randint(1, 5), draw.choice([0, 2])
    dtype = torch.complex64 if complex_ else torch.float32
    u, z, state = torch.randn(b, d, l), maybe(draw, b, d, l), torch.randn(b, d, n, dtype=dtype)
    delta = torch.randn(b, rank or d, l)
    A = torch.complex(-torch.rand(d, n), torch.randn(d, n)) if complex_ else -torch.rand(d, n)
    B, C = (torch.randn(b, *draw.choice([(), (1,), (d,)]), n, l, dtype=dtype) for _ in range(2))
    options = {"D": maybe(draw, d), "delta_bias": maybe(draw, d), "delta_softplus": True}
    options["dt_proj"] = torch.randn(d, rank) if rank else None
    whole = selective_scan(u, delta, A, B, C, z=z, initial_state=state, **options)
    outputs = []
    for t in range(l):
        gate = None if z is None else z[..., t]
        y, state = selective_scan_step(u[..., t], delta[..., t], A, B[..., t], C[..., t], state, z=gate, **options)
        outputs.append(y)
    assert_same((torch.stack(outputs, -1), state), whole)


def test_what_is_constant_per_channel():
    torch.manual_seed(0)
    u, delta, A, B, state = (torch.randn(shape) for shape in ((2, 4, 1), (2, 4, 1), (4, 3), (4, 3), (2, 4, 3)))
    whole = selective_scan(u, delta, A, B, B, initial_state=state)
    per_channel = B.expand(2, 4, 3)
    y, state = selective_scan_step(u[..., 0], delta[..., 0], A, per_channel, per_channel, state)
    assert_same((y.unsqueeze(-1), state), whole)


@pytest.mark.parametrize("seed", SEEDS)
def test_ssd_scan(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    b, l, g, n, p = draw.randint(1, 3), draw.randint(1, 70), draw.randint(1, 3), draw.randint(1, 5), draw.randint(1, 6)
    h = g * draw.randint(1, 3)
    x, dt, A = torch.randn(b, l, h, p), torch.randn(b, l, h), -torch.rand(h)
    B, C, z, state = torch.randn(b, l, g, n), torch.randn(b, l, g, n), maybe(draw, b, l, h, p), torch.randn(b, h, p, n)
    options = {"D": maybe(draw, *draw.choice([(h,), (h, p)])), "dt_bias": maybe(draw, h)}
    options |= {"dt_softplus": draw.random() < 0.5, "dt_limit": draw.choice([(0.0, float("inf")), (0.1, 0.9)])}
    whole = ssd_scan(x, dt, A, B, C, z=z, initial_state=state, **options)
    outputs = []
    for t in range(l):
        gate = None if z is None else z[:, t]
        y, state = ssd_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, z=gate, **options)
        outputs.append(y)
    assert_same((torch.stack(outputs, 1), state), whole)


@pytest.mark.parametrize("seed", SEEDS)
def test_causal_conv1d(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    b, d, l, w = draw.randint(1, 3), draw.randint(1, 20), draw.randint(1, 20), draw.randint(1, 5)
    x, weight, bias, silu = torch.randn(b, d, l), torch.randn(d, w), maybe(draw, d), draw.random() < 0.5
    state, outputs = torch.zeros(b, d, w - 1), []
    for t in range(l):
        y, state = causal_conv1d_step(x[..., t], state, weight, bias, silu)
        outputs.append(y)
    assert_same((torch.stack(outputs, -1),), (causal_conv1d(x, weight, bias, silu),))
    seen = torch.cat([torch.zeros(b, d, w - 1), x], -1)
    assert torch.equal(state, seen[..., seen.shape[-1] - w + 1 :])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_causal_conv1d_piece_by_piece(seed, packed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    b, d, l, w = draw.randint(1, 3), draw.randint(1, 20), draw.randint(1, 20), draw.randint(1, 5)
    x, weight, bias, silu = torch.randn(b, d, l), torch.randn(d, w), maybe(draw, d), draw.random() < 0.5
    reset = torch.rand(b, l) < 0.2 if packed else None
    cuts = [0, *sorted(draw.choices(range(l + 1), k=3)), l]
    state, outputs = draw.choice([None, torch.zeros(b, d, w - 1)]), []
    for first, last in itertools.pairwise(cuts):
        flags = None if reset is None else reset[:, first:last]
        y, state = causal_conv1d_run(x[..., first:last], state, weight, bias, silu, flags)
        outputs.append(y)
    assert_same((torch.cat(outputs, -1),), (causal_conv1d(x, weight, bias, silu, reset=reset),))
    for i in range(b):
        start = 0 if reset is None else max([0, *reset[i].nonzero().flatten().tolist()])
        seen = torch.cat([torch.zeros(d, w - 1), x[i, :, start:]], -1)
        assert torch.equal(state[i], seen[:, seen.shape[-1] - w + 1 :])


def test_a_window_of_another_width_is_named():
    message = r"^causal_conv1d_run: state has shape \(2, 4, 3\), expected \(2, 4, 2\)"
    with pytest.raises(RuntimeError, match=message):
        causal_conv1d_run(torch.zeros(2, 4, 5), torch.zeros(2, 4, 3), torch.zeros(4, 3))


SELECTIVE = [(2, 4), (2, 3), (4, 5), (2, 5), (2, 5), (2, 4, 5), (4,), (2, 4), (4,)]
SSD = [(2, 4, 3), (2, 4), (4,), (2, 2, 5), (2, 2, 5), (2, 4, 3, 5), (4, 3), (2, 4, 3), (4,)]
CONV = [(2, 4), (2, 4, 2), (4, 3), (4,)]


def inputs(shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


STEPS = [
    (lambda *x: selective_scan_step(*x[:9], True, x[9]), [*SELECTIVE, (4, 3)]),
    (lambda *x: ssd_scan_step(*x, True), SSD),
    (lambda *x: causal_conv1d_step(*x, True), CONV),
]
RESET = torch.tensor([[False, False, True, False], [False] * 4])


@pytest.mark.parametrize(("step", "shapes"), STEPS, ids=["selective_scan", "ssd_scan", "causal_conv1d"])
def test_gradients(step, shapes):
    assert torch.autograd.gradcheck(step, inputs(shapes))


@pytest.mark.parametrize("reset", [None, RESET], ids=["whole", "packed"])
def test_gradients_of_a_piece(reset):
    given = inputs([(2, 4, 4), *CONV[1:]])
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d_run(*x, True, reset), given)


@pytest.mark.parametrize(("step", "shapes"), STEPS, ids=["selective_scan", "ssd_scan", "causal_conv1d"])
def test_nothing_is_changed_and_autocast_changes_nothing(step, shapes):
    given = [x.detach() for x in inputs(shapes, torch.float32)]
    before = [x.clone() for x in given]
    outside = step(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = step(*given)
    assert all(torch.equal(a, b) for a, b in zip((*outside, *before), (*inside, *given), strict=True))


@pytest.mark.parametrize(("step", "shapes"), STEPS, ids=["selective_scan", "ssd_scan", "causal_conv1d"])
def test_half_precision_tokens_keep_a_float32_state(step, shapes):
    given = [x.detach() for x in inputs(shapes, torch.float32)]
    wanted, _ = step(given[0].bfloat16().float(), *given[1:])
    y, state = step(given[0].bfloat16(), *given[1:])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert error(y, wanted) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(("step", "shapes"), STEPS, ids=["selective_scan", "ssd_scan", "causal_conv1d"])
def test_wrong_shapes_are_named(step, shapes):
    for i, shape in enumerate(shapes):
        given = inputs(shapes)
        given[i] = torch.zeros(*shape[:-1], 9, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"^\w+_step: \w+ has shape .* expected "):
            step(*given)
