"""Verification of what is no whole network: operators through the tool, and failures that must show."""

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from ssmvision.engine.verify import verify_case
from ssmvision.engine.verify.case import Arguments
from ssmvision.engine.verify.compare import compare

PARITY = Path(__file__).parents[1] / "parity"


def unchanged(_):
    pass


@pytest.fixture
def verify_edited(tmp_path):
    """Verifies a copy of a case whose weights, tensors and arguments were edited."""

    def verify(case, weights=unchanged, tensors=unchanged, kwargs=unchanged, meta=unchanged):
        folder = Path(shutil.copytree(PARITY / case, tmp_path / case, dirs_exist_ok=True))
        for name, edit in (("ckpt", weights), ("io", tensors)):
            if edit is not unchanged:
                loaded = safetensors.torch.load_file(folder / f"{name}.safetensors")
                edit(loaded)
                contiguous = {key: x.contiguous() for key, x in loaded.items()}
                safetensors.torch.save_file(contiguous, folder / f"{name}.safetensors")
        said = json.loads((folder / "meta.json").read_text())
        kwargs(said["kwargs"])
        meta(said)
        (folder / "meta.json").write_text(json.dumps(said))
        return verify_case(folder)

    return verify


@pytest.mark.parametrize("case", ["ssm_selective_scan", "ssm_ssd", "ssm_linear_scan_resets", "ssm_2d_selective_scan"])
def test_operators_are_verified(case):
    result = verify_case(PARITY / case)
    assert result.ok, str(result)
    assert set(result.worst) == {"output", "gradient"}


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("ssm_s4_block", "layer.kernel.C"),
        ("ssm_s4_dplr", "legt.P"),
        ("ssm_s4nd", "kernel.1.A_imag"),
        ("ssm_s5_resets", "params/layers_1/seq/Lambda_re"),
        ("ssm_spacetime_companion", "closed_loop.k"),
        ("ssm_2dssm", "A.A_3"),
    ],
)
def test_a_wrong_weight_fails(case, key, verify_edited):
    assert not verify_edited(case, weights=lambda weights: weights[key].mul_(1.1)).ok


@pytest.mark.parametrize("case", ["ssm_s4_block", "ssm_s5_zoh", "ssm_2dssm_complex"])
def test_a_superfluous_weight_fails(case, verify_edited):
    assert "extra" in verify_edited(case, weights=lambda weights: weights.update(extra=torch.zeros(1))).problem


# A case of each check, and of networks.
CASES = [
    "ssm_2d_selective_scan", "ssm_2dssm", "ssm_convs5_layer", "ssm_fscil_neck_ssm", "ssm_hippo", "ssm_hiss_mamba",
    "ssm_hydra_block", "ssm_mamba1_block", "ssm_mamba2_block", "ssm_mamba3_siso", "ssm_motionmamba_unet",
    "ssm_ptd_init", "ssm_s4_block", "ssm_s4_dplr", "ssm_s4d_kernels", "ssm_s4d_minimal", "ssm_s4nd",
    "ssm_s5_classifier", "ssm_s5_resets", "ssm_s5_zoh", "ssm_selective_scan", "ssm_smamba", "ssm_spacetime_companion",
    "ssm_ssd", "ultralight_vm_unet",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_arguments_that_a_check_passes_over_are_named(case, verify_edited):
    assert "frobnicate" in str(verify_edited(case, kwargs=lambda kwargs: kwargs.update(frobnicate=True)))
    for name in ("output.frobnicated", "feat.frobnicated", "grad.frobnicated"):
        result = verify_edited(
            case,
            tensors=lambda tensors, name=name: tensors.update({name: torch.full((2,), 99.0)}),
            kwargs=lambda kwargs: kwargs.pop("frobnicate", None),
        )
        assert name in result.problem


@pytest.mark.parametrize(
    ("case", "edit"),
    [
        ("ssm_convs5_novq", lambda kwargs: kwargs["ssm"].update(frobnicate="bilinear")),
        ("ssm_hiss_mamba", lambda kwargs: kwargs["ll"].update(frobnicate=1)),
        ("ssm_ssd", lambda kwargs: kwargs["case0"].update(frobnicate=1)),
        ("vivim", lambda kwargs: kwargs["segformer_config"].update(frobnicate=1)),
    ],
)
def test_nested_arguments_that_a_check_passes_over_are_named(case, edit, verify_edited):
    assert "frobnicate" in str(verify_edited(case, kwargs=edit))


def test_arguments_remember_what_was_asked_for():
    arguments = Arguments({"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}, "g": 5, "h": {"i": 6, "j": 7}})
    assert arguments["a"] == 1
    assert arguments["b"].get("c") == 2
    arguments.ignore(("e", "absent", "h.i"))
    assert arguments.unasked() == ["g", "b.d", "h.j"]
    assert {**arguments["b"]} == {"c": 2, "d": 3}
    assert arguments.unasked() == ["g", "h.j"]


HARMLESS = [
    ("ssm_s4_block", {"postact": None, "initializer": None, "dt_fast": False, "kernel": None, "init": "diag"}),
    ("ssm_s4_block", {"init": "diag-linear", "lr": {"dt": 1e-3}}),
    ("ssm_s4_block_dplr", {"init": "dplr-lin", "disc": "zoh", "dt_tie": True}),
    ("ssm_s4nd", {"l_max": [9, 7], "return_state": False, "ln": False}),
    ("ssm_2dssm", {"truncation": None, "force_coeff_calc": False}),
    ("ssm_spacetime_companion", {"kernel_repeat": 1, "kernel_init": "normal", "kernel_train": True, "seed": 42}),
    ("ssm_hiss_mamba", {"ll": {"type": "MambaModel", "model_dim": 8, "output_dim": 12, "nlayers": 2, "dropout": 0.1}}),
    ("ssm_smamba", {"d_conv": 2, "expand": 1}),
    ("ssm_mamba2_block", {"activation": "swish"}),
    ("ssm_hydra_block", {"activation": "silu"}),
    ("ssm_convs5_novq", {"use_actions": False, "action_dim": 3, "action_embed_dim": 8, "lr": 1e-3}),
]


@pytest.mark.parametrize(("case", "options"), HARMLESS)
def test_options_without_effect_are_accepted(case, options, verify_edited):
    result = verify_edited(case, kwargs=lambda kwargs: kwargs.update(options))
    assert result.ok, str(result)


REFUSED = [
    ("ssm_s4_block", {"postact": "glu"}, "postact='glu' is not built here"),
    ("ssm_s4_block_dplr", {"dt_tie": False}, "dt_tie=False is not built here"),
    ("ssm_s4nd", {"l_max": [9]}, "one length for each of 2 axes"),
    ("ssm_2dssm", {"normalize": True}, "normalize=True is not built here"),
    ("ssm_2dssm", {"L": 26}, "places of a square, not 26"),
    ("ssm_spacetime_companion", {"kernel_repeat": 2}, "kernel_repeat=2 makes 32 channels, not model_dim=16"),
    ("ssm_hiss_mamba", {"hl": {"type": "TransformerNet", "model_dim": 12, "nlayers": 2}}, "not TransformerNet"),
    ("ssm_smamba", {"activation": "silu"}, "activation must be one of relu, gelu, not 'silu'"),
    ("ssm_smamba", {"d_conv": 4}, "conv1d.weight"),
    ("ssm_hydra_block", {"activation": "relu"}, "activation='relu' is not built here"),
    ("ssm_convs5_layer", {"squeeze_excite": True}, "squeeze_excite is not built here"),
]


@pytest.mark.parametrize(("case", "options", "sentence"), REFUSED)
def test_options_that_are_not_built_are_refused(case, options, sentence, verify_edited):
    assert sentence in verify_edited(case, kwargs=lambda kwargs: kwargs.update(options)).problem


def test_a_kernel_per_axis_may_be_shorter_than_its_axis(verify_edited):
    result = verify_edited("ssm_s4nd", kwargs=lambda kwargs: kwargs.update(l_max=[9, 3]))
    assert result.worst["output"][0] > 1


def test_tokens_before_channels(verify_edited):
    def transpose(tensors):
        for name in ("input", "output", "grad_input"):
            tensors[name] = tensors[name].mT

    result = verify_edited("ssm_s4d_minimal", tensors=transpose, kwargs=lambda kwargs: kwargs.update(transposed=False))
    assert result.ok, str(result)


def test_weights_that_began_as_nobody_should_are_verified(verify_edited):
    def only_legt(tensors):
        kept = {key: x for key, x in tensors.items() if key.startswith("diag-legs.zoh.exp.") and ".init." not in key}
        tensors.clear()
        tensors.update({key.replace("diag-legs", "diag-legt"): x for key, x in kept.items()})

    result = verify_edited("ssm_s4d_kernels", only_legt, only_legt)
    assert result.ok, str(result)


@pytest.mark.parametrize("case", ["ssm_s4_block", "ssm_s4nd"])
def test_outputs_at_another_rate_are_compared(case, verify_edited):
    def half_steps(weights):
        for name in weights:
            if name.endswith("inv_dt"):
                weights[name] -= math.log(2)

    def only_at_rate_2(tensors):
        given = {"input": tensors["input"], "output.rate2": tensors["output"]}
        tensors.clear()
        tensors.update(given)

    result = verify_edited(case, half_steps, only_at_rate_2)
    assert result.ok, str(result)
    assert not verify_edited(case, tensors=only_at_rate_2).ok


@pytest.mark.parametrize("official_class", [None, "models/s4/s4.py FFTConv"])
def test_a_class_that_is_not_known_is_one_line(official_class, verify_edited):
    problem = verify_edited("ssm_s4d_kernels", meta=lambda meta: meta.update(official_class=official_class)).problem
    assert "official_class must name S4D, S4Block, SSMKernelDiag" in problem


def test_what_takes_no_part_has_a_gradient_of_zero(verify_edited):
    meta = {"tolerance": {"rtol": 1e-4, "atol": 1e-5}}
    output = {"output": torch.ones(2)}
    assert compare("", output, output | {"grad.unused": torch.zeros(3)}, meta).ok
    assert "grad.unused" in compare("", output, output | {"grad.unused": torch.ones(3)}, meta).problem
    dead = "grad.encoder.attn_layers.0.man.A_log"  # of a module that the official layer makes and never runs
    assert verify_edited("ssm_smamba", tensors=lambda tensors: tensors.update({dead: torch.zeros(2)})).ok
    assert dead in verify_edited("ssm_smamba", tensors=lambda tensors: tensors.update({dead: torch.ones(2)})).problem


def write_case(folder, family, kwargs, tensors, weights=None):
    folder.mkdir()
    safetensors.torch.save_file({key: x.detach().contiguous() for key, x in tensors.items()}, folder / "io.safetensors")
    if weights is not None:
        safetensors.torch.save_file(weights, folder / "ckpt.safetensors")
    meta = {"family": family, "official_class": None, "kwargs": kwargs, "tolerance": {"rtol": 1e-4, "atol": 2e-5}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("kinds", ["const const", "const var", "var const"])
def test_complex_scans_take_constant_matrices_as_pairs(kinds, tmp_path):
    B_kind, C_kind = kinds.split()
    b, d, length, n = 2, 3, 5, 2
    torch.manual_seed(0)

    def matrix(kind):
        return torch.randn(d, n, 2) if kind == "const" else torch.randn(b, n, 2 * length)

    def at(x, kind, token):
        pairs = x if kind == "const" else x[..., 2 * token : 2 * token + 2][:, None]
        return torch.view_as_complex(pairs.contiguous())

    A = torch.stack([-torch.rand(d, n) - 0.1, torch.randn(d, n)], -1)
    given = {"u": torch.randn(b, d, length), "delta": torch.rand(b, d, length), "A": A}
    given |= {"B": matrix(B_kind), "C": matrix(C_kind)}
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    h, outputs = torch.zeros(b, d, n, dtype=torch.complex64), []
    for token in range(length):
        delta, u = (leaves[name][..., token, None] for name in ("delta", "u"))
        h = (delta * torch.view_as_complex(leaves["A"])).exp() * h + delta * at(leaves["B"], B_kind, token) * u
        outputs.append(2 * (at(leaves["C"], C_kind, token) * h).sum(-1).real)
    y = torch.stack(outputs, -1)
    grad_out = torch.randn_like(y)
    (y * grad_out).sum().backward()
    tensors = given | {f"grad.{name}": x.grad for name, x in leaves.items()} | {"out": y, "grad_out": grad_out}
    kwargs = {"case0": {"b": b, "d": d, "L": length, "N": n, "B": B_kind, "C": C_kind, "complex": True}}
    tensors = {f"case0.{name}": x for name, x in tensors.items()}
    result = verify_case(write_case(tmp_path / "case", "Mamba-1 S6", kwargs, tensors))
    assert result.ok, str(result)


def test_a_2d_kernel_of_one_place_has_no_gradient_of_its_dynamics(tmp_path):
    dim, n = 4, 3
    torch.manual_seed(0)
    weights = {f"{name}_{i}": torch.randn(rows, n) for name, rows in (("B", 2), ("C", dim)) for i in (1, 2)}
    weights |= {f"A.A_{i}": torch.randn(2, n) for i in (1, 2, 3, 4)} | {"omega": torch.randn(dim)}
    leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
    x = torch.randn(2, dim, 3, 3).requires_grad_()
    # Channels take the two copies in turn; where no state enters, there is nothing but the input.
    kernel = sum((leaves[f"C_{i}"] * leaves[f"B_{i}"].sigmoid().repeat(2, 1)).sum(-1) for i in (1, 2)) / math.sqrt(n)
    y = (kernel + leaves["omega"])[:, None, None] * x
    y.pow(2).mean().backward()
    gradients = {f"grad.{name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}
    kwargs = {"embed_dim": dim, "L": 1, "n_ssm": 2, "ndim": n, "directions_amount": 1, "complex_ssm": False}
    tensors = {"input": x, "output": y, "grad_input": x.grad} | gradients
    result = verify_case(write_case(tmp_path / "case", "2-D SSM (Baron et al.)", kwargs, tensors, weights))
    assert result.ok, str(result)


@pytest.mark.parametrize(("official", "function"), [("swish", F.silu), ("elu", F.elu)])
def test_activations_of_convs5_by_their_official_names(official, function):
    from ssmvision.models.convs5 import from_official

    kwargs = {"U": 4, "ssm_size": 4, "num_groups": 2, "activation": official, "C_D_config": "standard"}
    layer = from_official("ConvS5SSM", kwargs).eval()
    video = torch.randn(1, 3, 4, 5, 5)
    y = layer(video)
    layer.feedthrough.norm1.activation = "none"
    linear = layer(video)
    torch.testing.assert_close(y, function(linear))


def test_nothing_is_proved_by_a_case_without_outputs(verify_edited):
    for case in ("ssm_s4_block", "vim_midcls"):
        result = verify_edited(case, tensors=lambda t: [t.pop(k) for k in [*t] if not k.startswith("input")])
        assert not result.ok, str(result)


def test_what_is_not_finite_hides_no_error():
    meta = {"tolerance": {"rtol": 1e-6, "atol": 0.0}}
    wanted = torch.tensor([[1.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
    assert compare("", {"output": wanted}, {"output": wanted}, meta).ok
    assert not compare("", {"output": 5 * wanted}, {"output": wanted}, meta).ok
    for odd in (torch.inf, torch.nan):
        spoilt = wanted.clone()
        spoilt[0, 1] = odd
        assert not compare("", {"output": 5 * wanted}, {"output": spoilt}, meta).ok
    assert not compare("", {"output": wanted}, {"output": torch.full_like(wanted, torch.nan)}, meta).ok


def test_a_damaged_case_fails_in_one_line(verify_edited):
    result = verify_edited("vim_midcls", tensors=lambda t: t.pop("input"))
    assert not result.ok
    assert "\n" not in str(result)


def test_float32_tensors_are_known_to_their_rounding_alone():
    meta = {"tolerance": {"rtol": 1e-12, "atol": 1e-14}}
    exact = torch.tensor([1 / 3, 1e-3], dtype=torch.float64)
    assert compare("", {"output": exact}, {"output": exact.float()}, meta).ok
    assert not compare("", {"output": exact}, {"output": exact.float().double()}, meta).ok
    assert not compare("", {"output": exact * (1 + 1e-5)}, {"output": exact.float()}, meta).ok
