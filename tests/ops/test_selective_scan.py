"""Numbers: every backend against the float64 definition, and the definition against plain loops."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scan_cases import (
    BACKENDS,
    EVERYTHING,
    Case,
    assert_matches,
    cast,
    evaluate,
    lay_out,
    make,
    naive_scan,
    random_case,
)

from ssmvision.ops import backend_info, routes, selective_scan

CASES = [
    *(Case(l=l, softplus=True, initial=True) for l in (1, 2, 63, 64, 65, 128, 129)),
    *(Case(d=d, l=33, B="shared", C=d, rank=2, softplus=True) for d in (1, 3, 4, 7, 8, 16, 17, 32, 35)),
    *(Case(n=n, d=17, l=66, D=True) for n in (1, 2, 3, 4, 5, 16, 17)),
    # Two vectors of channels go together, unless a group ends between them.
    *(Case(d=d, B=B, n=n, l=70, softplus=True, bias=True) for d, B, n in ((33, 1, 1), (64, 2, 5), (96, 2, 2))),
    *(Case(**{name: value}) for name, value in EVERYTHING.items()),
    *(
        Case(d=48, B=B, C=C, l=70, softplus=True)
        for B, C in [(1, 2), (2, 3), (3, 1), (16, 48), ("channel", "shared"), ("shared", "channel"), ("channel", 4)]
    ),
    *(Case(layout=layout, d=20, l=70, B=2, C=4, **EVERYTHING) for layout in ("first", "last", "strided")),
    *(
        Case(layout=layout, k=2, d=16, l=66, routes="random", u_per_route=per_route, **EVERYTHING)
        for layout in ("first", "last", "strided")
        for per_route in (False, True)
    ),
    *(
        Case(k=4, l=66, d=18, routes=name, softplus=True, D=True, reset="random", initial=True)
        for name in ("", "random", "subset", "bidirectional", "cross", "column", "serpentine", "window", "atrous")
    ),
    Case(k=2, l=66, routes="volume", softplus=True),
    Case(k=1, l=9, routes="random"),
    Case(k=0, l=9, routes="random"),
    *(Case(k=3, l=12, routes=name, merge=False, D=True, u_per_route=True) for name in ("", "random", "subset")),
    *(Case(l=130, reset=tokens, initial=True, softplus=True) for tokens in ((0,), (63, 64, 65), (128,), range(130))),
    Case(growing=True, l=40, D=True),
    Case(growing=True, l=40, softplus=True, bias=True),
]
TINY = [
    Case(b=1, d=2, n=2, l=5),
    Case(b=2, d=2, n=1, l=4, **EVERYTHING),
    Case(b=1, d=4, n=2, l=4, B=2, C=4, softplus=True),
    Case(b=1, d=2, n=3, l=4, B="channel", C="channel", D=True),
    Case(b=2, k=2, d=2, n=2, l=6, routes="random", **EVERYTHING),
    Case(b=1, k=4, d=2, n=1, l=6, routes="cross", B=2, C="channel", u_per_route=True),
    Case(b=1, k=2, d=2, n=2, l=6, routes="subset", merge=False, reset=(2,)),
    Case(b=1, k=2, d=2, n=1, l=4),
    Case(b=1, d=2, n=1, l=5, growing=True),
    Case(b=1, d=1, n=1, l=1),
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_definition_is_the_recurrence(case):
    arguments = make(case)
    found = evaluate(arguments, backend="reference")
    assert_matches(found, evaluate(arguments, scan=naive_scan), output=1e-13, gradient=1e-12)


@pytest.mark.parametrize("case", [*CASES, *map(random_case, range(40))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_the_definition(backend, case):
    arguments = make(case)
    wanted = evaluate(arguments, backend="reference")
    assert_matches(evaluate(cast(arguments, torch.float32), backend=backend), wanted, growing=case.growing)


@pytest.mark.parametrize("case", [Case(b=1), Case(b=1, k=2, routes="random")], ids=str)
def test_threads_share_the_channels_of_one_sample(case, threads):
    arguments = make(replace(case, d=70, n=16, l=2048 // max(1, case.k), **EVERYTHING))
    wanted = evaluate(arguments, backend="reference")
    assert_matches(evaluate(cast(arguments, torch.float32), backend="cpu"), wanted)


@pytest.mark.parametrize("shape", [{"b": 0}, {"l": 0}, {"b": 0, "l": 1}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_scan(backend, shape):
    arguments = make(Case(**shape, **{**EVERYTHING, "rank": 0}))
    wanted = evaluate(arguments, backend="reference")
    assert_matches(evaluate(cast(arguments, torch.float32), backend=backend), wanted)
    if "l" in shape and shape.get("b") != 0:
        assert torch.equal(wanted["last_state"], arguments["initial_state"])


@pytest.mark.parametrize("layout", ["last", "strided"])
@pytest.mark.parametrize("name", ["reset", "routes"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flags_and_routes_of_any_strides(backend, name, layout):
    arguments = cast(make(Case(k=2, l=20, routes="random", reset="random")), torch.float32)
    wanted = evaluate(arguments, backend=backend)
    assert_matches(evaluate({**arguments, name: lay_out(arguments[name], layout)}, backend=backend), wanted)


def scan(arguments, backend, **changes):
    return selective_scan(**{**cast(arguments, torch.float32), **changes}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["random", "subset", "cross", "serpentine", "window", "atrous"])
def test_a_route_is_a_permuted_scan_put_back(backend, name):
    arguments = make(Case(k=1, d=6, l=24, routes=name, **{**EVERYTHING, "z": False}))
    route = arguments["routes"][0]
    permuted = {n: arguments[n][..., route] for n in ("u", "delta", "B", "C", "reset")}
    y_ordered, last = scan(arguments, backend, **cast(permuted, torch.float32), routes=None)
    y = torch.zeros(2, 6, 24).index_copy(-1, route, y_ordered)
    found = scan(arguments, backend)
    torch.testing.assert_close(found[0], y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], last, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 30, 64, 99])
def test_the_last_state_carries_a_scan_on(backend, cut):
    arguments = make(Case(l=100, d=9, B=3, **{**EVERYTHING, "z": False}))
    whole, last = scan(arguments, backend)
    halves, state = [], arguments["initial_state"].float()
    for part in (slice(None, cut), slice(cut, None)):
        pieces = cast({n: arguments[n][..., part] for n in ("u", "delta", "B", "C", "reset")}, torch.float32)
        y, state = scan(arguments, backend, **pieces, initial_state=state)
        halves.append(y)
    torch.testing.assert_close(torch.cat(halves, -1), whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, last, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("starts", [(0, 5), (0, 64), (0, 63, 65, 128)])
def test_reset_separates_packed_sequences(backend, starts):
    arguments = make(Case(l=140, d=6, reset=starts, D=True, softplus=True))
    packed, last = scan(arguments, backend)
    alone = []
    for begin, end in zip(starts, [*starts[1:], 140], strict=True):
        pieces = {n: arguments[n][..., begin:end] for n in ("u", "delta", "B", "C")}
        alone.append(scan(arguments, backend, **cast(pieces, torch.float32), reset=None))
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, alone[-1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_routes_in_one_call_are_the_sum_of_calls(backend):
    arguments = make(Case(k=4, d=18, l=66, routes="cross", B=2, u_per_route=True, **{**EVERYTHING, "z": False}))
    merged, last = scan(arguments, backend)
    per_call = {}
    for ik in range(4):
        one = {n: arguments[n][:, ik : ik + 1] for n in ("u", "delta", "B", "C", "initial_state", "reset")}
        one |= {n: arguments[n][ik : ik + 1] for n in ("A", "D", "delta_bias", "dt_proj", "routes")}
        per_call[ik] = scan(arguments, backend, **cast(one, torch.float32))
    torch.testing.assert_close(merged, sum(y for y, _ in per_call.values()), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(last, torch.cat([s for _, s in per_call.values()], 1), rtol=1e-6, atol=1e-6)
    apart, _ = scan(arguments, backend, merge=False)
    torch.testing.assert_close(apart.sum(1), merged, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_reset_and_one_u_serve_all_routes(backend):
    arguments = cast(make(Case(k=2, l=12, routes="bidirectional", reset=(4,))), torch.float32)
    spread = {
        "u": arguments["u"].unsqueeze(1).expand(-1, 2, -1, -1),
        "reset": arguments["reset"][:, None].expand(2, 2, 12),
    }
    torch.testing.assert_close(
        selective_scan(**arguments, backend=backend), selective_scan(**{**arguments, **spread}, backend=backend)
    )


def test_reversed_route_is_a_flipped_scan():
    arguments = cast(make(Case(l=20)), torch.float32)
    flipped, _ = selective_scan(**{**arguments, **{n: arguments[n].flip(-1) for n in ("u", "delta", "B", "C")}})
    y, _ = selective_scan(**{**arguments, "routes": routes.reverse(torch.arange(20))[None]})
    torch.testing.assert_close(y, flipped.flip(-1))


INSTRUCTION_SETS = ["generic", "avx2", "avx512"]  # each machine runs those up to the one that it picks by itself


@pytest.mark.skipif("SSMVISION_ISA" in os.environ, reason="an instruction set is forced already")
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_other_instruction_sets(isa):
    best = backend_info()["cpu"]["detail"]
    if INSTRUCTION_SETS.index(isa) >= INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine picks {best}, which this file tests")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not reference", __file__]
    environment = {**os.environ, "SSMVISION_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif("SSMVISION_ISA" not in os.environ, reason="no instruction set is forced")
def test_the_instruction_set_is_the_forced_one():
    assert backend_info()["cpu"]["detail"] == os.environ["SSMVISION_ISA"]
