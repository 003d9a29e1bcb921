"""Operators at the shapes of real models, against the sequential scan as it is published, and against float64."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmvision.ops import causal_conv1d, fft_conv, linear_scan, routes, selective_scan, ssd_scan

from .limits import EXPONENTIALS, exponentials
from .timing import Bar, interleaved

Call = Callable[[], object]


@dataclass(frozen=True)
class OpShape:
    """One selective scan: batch, routes, channels, states and tokens; a square image where there are routes."""

    batch: int
    routes: int
    channels: int
    states: int
    tokens: int
    slow: int = 3  # timed forward passes of the published form
    slow_train: int = 3  # the same with gradients, whose cost is quadratic in tokens
    bars: dict[str, Bar] = field(default_factory=dict)  # figure of `measure_op` → what it should be

    @property
    def elements(self) -> int:
        """State updates of one forward pass."""
        return self.batch * self.routes * self.channels * self.states * self.tokens

    @property
    def exponentials(self) -> int:
        """One per state update, and what softplus costs: about two per token and channel."""
        return self.elements + 2 * self.elements // self.states

    @property
    def bytes(self) -> int:
        """Of u, delta and y, each moved once, and of B and C."""
        return 4 * self.batch * self.routes * self.tokens * (3 * self.channels + 2 * self.states)


_COMMON = {
    "output error": Bar(2e-6, at_least=False), "gradient error": Bar(5e-6, at_least=False),
    "backward / forward": Bar(2.5, at_least=False), "routes / raster": Bar(1.15, at_least=False),
}  # fmt: skip
OPS = {
    "Vim-T": OpShape(1, 1, 384, 16, 197, slow=20, slow_train=6, bars={
        "forward speedup": Bar(50), "train speedup": Bar(150), "of exp limit": Bar(0.75),
    }),
    "Vim-S": OpShape(1, 1, 768, 16, 197, slow=20),
    "VMamba stage 1": OpShape(1, 4, 192, 1, 3136, slow_train=1, bars={
        "forward speedup": Bar(30), "train speedup": Bar(400),
    }),
    "VMamba stage 3": OpShape(1, 4, 768, 1, 196, slow=20),
    "volume": OpShape(1, 1, 96, 16, 32768, slow_train=0, bars={
        "forward speedup": Bar(100), "of exp limit": Bar(0.65),
    }),
}  # fmt: skip


def published_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """The sequential scan in the form in which reference implementations publish it: one time step after the other.

    Shapes as in `selective_scan` with one route; grouped B and C.
    """
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    if B.shape[1] == 1:  # shared by all channels: never repeated
        drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B[:, 0], u)
    else:
        drive = torch.einsum("bdl,bdnl,bdl->bdln", delta, B.repeat_interleave(u.shape[1] // B.shape[1], dim=1), u)
    C = C.repeat_interleave(u.shape[1] // C.shape[1], dim=1) if C.shape[1] > 1 else C.expand(-1, u.shape[1], -1, -1)
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[:, :, :, t]))
    return torch.stack(outputs, dim=2) + u * D[:, None]


def _inputs(shape: OpShape) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias in the layouts of our layers, routes folded into channels as in the papers."""
    b, k, d, n, length = shape.batch, shape.routes, shape.channels, shape.states, shape.tokens
    generator = torch.Generator().manual_seed(0)

    def tokens(*sizes: int) -> Tensor:
        return torch.randn(b, length, *sizes, generator=generator).movedim(1, -1)

    A = -torch.arange(1.0, n + 1).repeat(k * d, 1)
    delta_bias = torch.randn(k * d, generator=generator) - 4
    return [tokens(k * d), 0.1 * tokens(k * d), A, tokens(k, n), tokens(k, n), torch.ones(k * d), delta_bias]


def _native(*args: Tensor, backend: str = "cpu", order: Tensor | None = None) -> Tensor:
    u, delta, A, B, C, D, bias = args
    return selective_scan(
        u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, routes=order, backend=backend
    )[0]  # fmt: skip


def _forward(scan: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    def run() -> object:
        with torch.no_grad():
            return scan(*tensors)

    return run


def _train(scan: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    leaves = [x.detach().requires_grad_() for x in tensors]

    def run() -> object:
        y = scan(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def _backward(scan: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = scan(*leaves)
    ones = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, leaves, ones, retain_graph=True)


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _accuracy(shape: OpShape, inputs: list[Tensor]) -> dict[str, float]:
    """Largest errors against the float64 definition, relative to the largest value; the published form agrees too."""

    def reference(*args: Tensor) -> Tensor:
        return _native(*args, backend="reference")

    exact = [x.double() for x in inputs]
    y: Any = _forward(_native, inputs)()
    wanted: Any = _forward(reference, exact)()
    published: Any = _forward(published_scan, inputs)()
    results = {"output error": _error(y, wanted)}
    if _error(published.double(), wanted) > 1e-4 or not results["output error"] <= 1e-4:
        raise RuntimeError(f"scans disagree, nothing is measured: error {results['output error']:.1e}")
    if shape.slow_train > 1:
        found, grads = (_train(scan, x)() for scan, x in ((_native, inputs), (reference, exact)))
        results["gradient error"] = max(_error(g, w) for g, w in zip(found, grads, strict=True))  # type: ignore[call-overload]
    return results


def measure_op(shape: OpShape, repeats: int) -> dict[str, float]:
    """Times and ratios of one selective scan, whose numbers are checked first.

    Returns:
        Milliseconds "forward", "backward" and "train" (both), each alone in a loop; "published forward" and "published
        train", and "in-turn forward" and "in-turn train" of the native scan between two of them, when nothing of it is
        in a cache, whose quotients are "forward speedup" and "train speedup"; "backward / forward"; "of exp limit"; for
        four routes "routes / raster"; "output error" and "gradient error" against float64. What takes too long at a
        shape is left out.

    Raises:
        RuntimeError: The scans compared do not agree.
    """
    inputs = _inputs(shape)
    # Each side gets the memory layout that suits it: channels-last the native scan, channels-first the sequential one.
    rows = [x.contiguous() for x in inputs]
    results = _accuracy(shape, inputs)
    kinds = {"forward": _forward, "train": _train}
    # Next to bare exponentials, which leave the scan its cache: a fraction of the limit at the same moment.
    alone = interleaved({"forward": _forward(_native, inputs), "exp2": exponentials()}, repeats)
    results["forward"] = alone["forward"]
    results["of exp limit"] = shape.exponentials / EXPONENTIALS * alone["exp2"] / alone["forward"]
    results |= interleaved({"backward": _backward(_native, inputs)}, repeats)
    results |= interleaved({"train": _train(_native, inputs)}, repeats)
    for kind, wrap in kinds.items():
        times = shape.slow_train if kind == "train" else shape.slow
        if not times:
            continue
        # In turn with the native scan, so that a change of the machine's speed touches both.
        pair = {"native": wrap(_native, inputs), "published": wrap(published_scan, rows)}
        if kind == "forward" or times > 1:
            found = interleaved(pair, times)
            results[f"in-turn {kind}"] = found["native"]
        else:  # a call of many seconds is its own warm-up
            found = interleaved({"published": pair["published"]}, 1, warm_up=False) | interleaved(
                {"native": pair["native"]}, repeats
            )
        results[f"published {kind}"] = found["published"]
        results[f"{kind} speedup"] = found["published"] / found["native"]
    results["backward / forward"] = results["backward"] / results["forward"]
    if shape.routes == 4:
        results["routes / raster"] = _measure_routes(shape, repeats)
    return results


def bars(shape: OpShape) -> dict[str, Bar]:
    """The bars of a shape by figure."""
    return _COMMON | shape.bars


def time_growth(repeats: int, lengths: tuple[int, int] = (4096, 32768)) -> float:
    """Time of forward and backward of one scan (d 96, n 16) at the second length over that at the first."""
    short, long = (f"{length} tokens" for length in lengths)
    calls = {
        name: _train(_native, _inputs(OpShape(1, 1, 96, 16, length)))
        for name, length in zip((short, long), lengths, strict=True)
    }
    found = interleaved(calls, repeats)
    return found[long] / found[short]


def _measure_routes(shape: OpShape, repeats: int) -> float:
    """A scan along the four routes of an image, over the same four scans all in raster order; both are summed."""
    u, delta, A, B, C, D, bias = _inputs(shape)
    k, side = shape.routes, int(shape.tokens**0.5)
    u = u[:, : shape.channels].transpose(1, 2).contiguous().transpose(1, 2)
    args = (u, delta.unflatten(1, (k, -1)), A.unflatten(0, (k, -1)), B, C, D.view(k, -1), bias.view(k, -1))
    cross = routes.cross(side, side)
    calls = {"routes": _forward(lambda *x: _native(*x, order=cross), [*args]), "raster": _forward(_native, [*args])}
    found = interleaved(calls, repeats)
    return found["routes"] / found["raster"]


@torch.no_grad()
def measure_layers(repeats: int) -> dict[str, dict[str, float]]:
    """The other operators, each beside what a user would write in PyTorch; their results are compared first.

    Returns:
        Operator and shape → milliseconds "ours" and "PyTorch", the "bytes" that must be moved, and for the scan of a
        ConvS5 layer its "share" of the layer's forward pass.
    """
    return {
        "linear_scan, ConvS5 (T 96, P 64 complex, 16 x 16)": _convs5(repeats),
        "ssd_scan (h 12, p 64, n 64, l 784)": _ssd(repeats),
        "causal_conv1d + SiLU (d 384, w 4, l 197)": _conv(repeats),
        "fft_conv (d 384, l 3136)": _fft(repeats),
    }


def _compare(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], size: int, repeats: int) -> dict[str, float]:
    if (error := _error(ours(), theirs())) > 1e-4:
        raise RuntimeError(f"operators disagree, nothing is measured: error {error:.1e}")
    return interleaved({"ours": ours, "PyTorch": theirs}, repeats) | {"bytes": size}


def _convs5(repeats: int) -> dict[str, float]:
    frames, width, states, pixels = 96, 128, 64, 16
    x = torch.randn(1, frames, states, pixels * pixels, dtype=torch.complex64)
    a = 0.9 * torch.exp(1j * torch.rand(1, 1, states, 1))

    def loop() -> Tensor:
        state, outputs = torch.zeros_like(x[:, 0]), []
        for t in range(frames):
            state = torch.addcmul(x[:, t], a[:, 0], state)
            outputs.append(state)
        return torch.view_as_real(torch.stack(outputs, 1))

    def ours() -> Tensor:
        return torch.view_as_real(linear_scan(a, x)[0])

    found = _compare(ours, loop, 2 * x.nbytes, repeats)
    images = torch.randn(frames, width, pixels, pixels)
    kernel = torch.randn(2 * states, width, 3, 3) / 30
    conv = interleaved({"conv": lambda: F.conv2d(images, kernel, padding=1)}, max(2, repeats // 5))["conv"]
    return found | {"share": found["ours"] / (found["ours"] + 2 * conv)}  # B and C are one real convolution each


def _ssd(repeats: int) -> dict[str, float]:
    b, heads, p, n, length = 1, 12, 64, 64, 784
    x, step = torch.randn(b, length, heads, p), F.softplus(torch.randn(b, length, heads) - 4)
    A, B, C = -torch.rand(heads) - 0.5, torch.randn(b, length, 1, n), torch.randn(b, length, 1, n)

    def scan(backend: str) -> Callable[[], Tensor]:
        return lambda: ssd_scan(x, step, A, B, C, backend=backend)[0]

    return _compare(scan("cpu"), scan("reference"), 2 * x.nbytes + B.nbytes + C.nbytes, repeats)


def _conv(repeats: int) -> dict[str, float]:
    x, weight, bias = torch.randn(1, 197, 384).transpose(1, 2), torch.randn(384, 4), torch.randn(384)
    rows = x.contiguous()

    def theirs() -> Tensor:
        return F.silu(F.conv1d(rows, weight[:, None], bias, padding=3, groups=384)[..., :197])

    return _compare(lambda: causal_conv1d(x, weight, bias, silu=True), theirs, 2 * x.nbytes, repeats)


def _fft(repeats: int) -> dict[str, float]:
    u, kernel = torch.randn(1, 384, 3136), torch.randn(384, 3136) / 50

    def direct() -> Tensor:
        return F.conv1d(F.pad(u, (3135, 0)), kernel.flip(-1)[:, None], groups=384)

    return _compare(lambda: fft_conv(u, kernel), direct, 2 * u.nbytes + kernel.nbytes, max(1, repeats // 10))
