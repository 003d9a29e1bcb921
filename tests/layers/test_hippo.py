"""HiPPO matrices and what is made of them: golden cases, normality, stability."""

import math
import warnings
from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.layers import S4DKernel
from ssmvision.layers.hippo import (
    DIAGONAL_INITS,
    NPLR_MEASURES,
    diagonal_init,
    hippo,
    hippo_low_rank,
    init_log_dt_,
    nplr,
)
from ssmvision.layers.ptd import ptd, transfer_function

PARITY = Path(__file__).parents[1] / "parity"


@pytest.mark.parametrize("case", ["ssm_hippo", "ssm_ptd_init"])
def test_golden_case(case):
    result = verify_case(PARITY / case)
    assert result.ok, str(result)


@pytest.mark.parametrize("measure", NPLR_MEASURES)
def test_correction_makes_normal(measure):
    A, _ = hippo(measure, 12)
    P = hippo_low_rank(measure, 12, rank=2)
    normal = A + P.T @ P
    torch.testing.assert_close(normal @ normal.T, normal.T @ normal, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier", "fourier_decay"])
def test_normal_form_is_the_same_system(measure):
    A, B = hippo(measure, 12)
    W, P, b, V = nplr(measure, 12, rank=2, B_clip=None)
    full = torch.cat([V, V.conj()], -1)
    correction = torch.cat([P, P.conj()], -1)
    diagonal = torch.diag(torch.cat([W, W.conj()])) - correction.T @ correction.conj()
    torch.testing.assert_close((full @ diagonal.to(full) @ full.mH).real, A, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close((full @ torch.cat([b, b.conj()])).real, B, rtol=1e-12, atol=1e-12)


UNDAMPED = ("lagt", "fourier", "fout", "fourier_decay", "fourier2")


@pytest.mark.parametrize("init", DIAGONAL_INITS)
def test_diagonal_systems_fade_or_warn(init):
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        A, B = diagonal_init(f"diag-{init}", 16)
    assert A.shape == B.shape == (8,)
    assert A.imag.max() <= 1e-12
    if init in UNDAMPED:
        assert A.real.abs().max() <= 1e-12
        assert [str(w.message)[:42] for w in warned] == [f"no state of {init!r} fades without its low-rank"[:42]]
    else:
        assert A.real.max() < -0.05
        assert not warned


def test_a_layer_keeps_the_small_damping_of_the_official_one():
    with pytest.warns(UserWarning, match="no state of 'fourier' fades"):
        layer = S4DKernel(2, d_state=8, init="fourier")
    torch.testing.assert_close(layer.A_real, torch.full_like(layer.A_real, math.log(1e-4)))
    with pytest.raises(ValueError, match="no state of 'legt' fades without its low-rank correction"):
        S4DKernel(2, d_state=8, init="legt")


@pytest.mark.parametrize("n", [2, 4, 6, 8, 10, 12, 14, 16, 32, 64])
def test_ptd_is_stable_and_near(n):
    A, B = hippo("legs", n)
    found = ptd(n)
    assert found.Lambda.real.max() < -0.5
    assert found.deviation < 0.05
    assert found.condition < 2e5
    omega = torch.linspace(0, 2 * n * n, 300, dtype=torch.float64)
    C = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(torch.complex128)
    wanted = C @ torch.linalg.solve(1j * omega[:, None, None] * torch.eye(n) - A, B.to(C)).T
    CB = (C @ found.V) * (found.V_inv @ B.to(C))
    pairs = torch.cat([found.Lambda, found.Lambda.conj()]), torch.cat([CB, CB.conj()], -1)
    error = (transfer_function(*pairs, omega) - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    assert error.max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("n", sorted({*range(18, 64, 2)} - {32}))
def test_ptd_is_stable_for_every_size(n):
    found = ptd(n)
    assert found.Lambda.real.max() < -0.5
    assert found.deviation < 0.05
    assert found.condition < 1e6


@pytest.mark.parametrize("n", [2, 8, 16, 64])
def test_ptd_balances_inputs_and_outputs(n):
    found = ptd(n)
    identity = torch.eye(n // 2, dtype=torch.complex128)
    torch.testing.assert_close(found.V_inv @ found.V, identity, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.V.norm(dim=0), found.V_inv.norm(dim=1))


def test_dropping_the_correction_is_not_near():
    n = 32
    A, B = hippo("legs", n)
    W, b = nplr("legs", n, B_clip=None)[0::2]
    V = nplr("legs", n)[3]
    omega = torch.linspace(0, 2 * n * n, 300, dtype=torch.float64)
    C = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(torch.complex128)
    wanted = C @ torch.linalg.solve(1j * omega[:, None, None] * torch.eye(n) - A, B.to(C)).T
    CB = (C @ V) * b / 2
    error = transfer_function(torch.cat([W, W.conj()]), torch.cat([CB, CB.conj()], -1), omega) - wanted
    assert (error.abs().amax(-1) / wanted.abs().amax(-1)).max() > 0.5


def test_the_clip_of_B_hides_the_spike():
    def gain(omega, **args):
        A, B = diagonal_init("legs", 64, **args)
        return transfer_function(torch.cat([A, A.conj()]), torch.cat([B, B.conj()]).abs(), torch.tensor([omega])).abs()

    fastest = diagonal_init("legs", 64)[0].imag.abs().max().item()
    assert gain(fastest, B_clip=None) > 75
    assert gain(fastest) < 6
    assert diagonal_init("legs", 64, B_clip=0.5)[1].imag.abs().max() == 0.5


def test_step_sizes_are_log_uniform():
    torch.manual_seed(0)
    steps = torch.empty(4000)
    init_log_dt_(steps, 1e-4, 1e-2)
    assert steps.exp().min() >= 1e-4 * 0.999
    assert steps.exp().max() <= 1e-2 * 1.001
    assert 0.45 < (steps.exp() < 1e-3).float().mean() < 0.55


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo("legz", 4), "no measure 'legz'"),
        (lambda: hippo_low_rank("lmu", 4), "no measure 'lmu' here"),
        (lambda: hippo_low_rank("legt", 4, rank=1), "has rank 2, not 1"),
        (lambda: nplr("legs", 5), "5 is odd"),
        (lambda: ptd(5), "5 is odd"),
        (lambda: ptd(4, relative=1e-4), "no perturbation of relative size 0.0001"),
        (lambda: ptd(48, relative=0.3), "no perturbation of relative size 0.3"),
        (lambda: diagonal_init("normal", 4), "no initialization 'normal'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
