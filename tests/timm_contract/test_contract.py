"""timm's contract: the tests timm applies to each of its own models must pass for each of ours.

By default the micro models (`test_*`) are checked, and one published model of each kind (`slow`: minutes on a CPU).
Name others with `SSMVISION_CONTRACT_MODELS='vim_tiny*,vmamba_small*' pytest tests/timm_contract`.

Not applied: `test_model_load_pretrained` and `test_model_features_pretrained` unless `HF_ENDPOINT` names a Hub, and
`test_model_forward_torchscript_with_features_fx`, which timm wrote for the one model regnetx_002.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from fnmatch import filter as matching
from pathlib import Path

import pytest
import timm
from timm_source import timm_tests

import ssmvision

HERE = Path(__file__).parent
SLOW = ["vim_tiny_patch16_224", "vmamba_tiny_s1l8"]
CHOSEN = os.environ.get("SSMVISION_CONTRACT_MODELS")
PATTERNS = CHOSEN.split(",") if CHOSEN else ["test_*", *SLOW]
IN_TIMM = [name for name in ssmvision.list_models() if timm.is_model(name)]
MODELS = sorted({name for pattern in PATTERNS for name in matching(IN_TIMM, pattern)})

# timm's own limit on the cost of a check; any other skip would be a check that silently did not run.
ALLOWED_SKIP = "Fixed input size model > limit"
CHECKS = {
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
    "test_at_fixed_size",
    "test_at_64_with_kwargs",
    "test_forward_after_prune_intermediate_layers",
    "test_headless_checkpoint_reload",
    "test_prune_intermediate_layers_params_used",
    "test_hub_round_trip_of_another_stem_and_head",
}
CHECKS_OF_PYRAMIDS = {
    "test_model_default_cfgs",
    "test_model_forward_features",
    "test_features_only_grad_checkpointing_backward",
}
CHECKS_OF_TOKEN_MODELS = {"test_model_default_cfgs_non_std", "test_hub_round_trip_after_resize"}


def environment(model: str, package: str) -> dict[str, str]:
    # A runner's variables would shrink timm's suite (GITHUB_ACTIONS) or hand it our own pytest options.
    env = {k: v for k, v in os.environ.items() if k != "GITHUB_ACTIONS" and not k.startswith("PYTEST_")}
    if "HF_ENDPOINT" not in env:
        env["HF_HUB_OFFLINE"] = "1"
    env.setdefault("TIMEOUT", "600")  # timm's default of 120 s would measure how busy the machine is
    return env | {"TIMM_CONTRACT_PACKAGE": package, "TIMM_CONTRACT_MODELS": model}


def problems_in(report: ET.Element) -> list[str]:
    """List everything that is not a check that ran and passed."""
    cases = list(report.iter("testcase"))
    problems = [
        f"{case.get('name')}: {kind}: {(outcome.get('message', '').splitlines() or [''])[0]}"
        for case in cases
        for kind in ("failure", "error", "skipped")
        for outcome in case.findall(kind)
        if ALLOWED_SKIP not in outcome.get("message", "")
    ]
    ran = {case.get("name", "").partition("[")[0] for case in cases}
    missing = [(CHECKS | more) - ran for more in (CHECKS_OF_PYRAMIDS, CHECKS_OF_TOKEN_MODELS)]
    if all(missing):
        problems.append(f"not collected for this model: {sorted(min(missing, key=len))}")
    return problems


def run_contract(model: str, folder: Path, package: str = "ssmvision") -> tuple[list[str], str]:
    """Check one model in a process of its own: timm's tests list models at import, ours are already registered here."""
    tests = timm_tests()
    shutil.copy(tests / "test_models.py", folder / "timm_models.py")
    shutil.copy(tests / "test_model_input.py", folder / "timm_model_input.py")
    shutil.copy(HERE / "contract_plugin.py", folder)
    shutil.copy(HERE / "reaimed.py", folder)
    # -m puts the folder on the path, and /dev/null keeps our strict markers away from timm's tests.
    options = f"-c {os.devnull} --rootdir . -W ignore -q --timeout=600 -p contract_plugin --junitxml=report.xml"
    command = [sys.executable, "-m", "pytest", *options.split(), "timm_models.py", "reaimed.py"]
    env = environment(model, package)
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    report = folder / "report.xml"
    problems = problems_in(ET.parse(report).getroot() if report.exists() else ET.Element("none"))
    if done.returncode and not problems:
        problems.append(f"pytest ended with {done.returncode}")
    return problems, done.stdout + done.stderr


def test_every_pattern_names_a_model():
    assert [pattern for pattern in PATTERNS if not matching(IN_TIMM, pattern)] == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
)
def test_timm_contract(model, tmp_path):
    problems, output = run_contract(model, tmp_path)
    assert not problems, "\n".join([f"{model} breaks timm's contract:", *problems, "", output[-20000:]])


BROKEN = """
import timm, torch
from timm.models import register_model

@register_model
def test_broken(pretrained=False, **kwargs):
    model = timm.create_model("test_resnet", **kwargs)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    return model
"""
THIEF = """
import timm
from timm.models import register_model

@register_model
def test_resnet(pretrained=False, **kwargs):
    return timm.create_model("test_convnext", **kwargs)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "model", "complaints"),
    [
        # Without a cfg of its own timm does not list the model for its backward tests.
        (BROKEN, "test_broken", ["unused params: ['unused']", "not collected for this model: ['test_model_backward'"]),
        (BROKEN, "no_such_model", ["no model matches"]),
        (THIEF, "test_resnet", ["took over names of timm: ['test_resnet']"]),
        ("import timm", "*", ["registered no model"]),
    ],
    ids=["broken", "absent", "thief", "empty"],
)
def test_contract_is_able_to_fail(source, model, complaints, tmp_path):
    (tmp_path / "toy_package.py").write_text(source)
    problems, output = run_contract(model, tmp_path, "toy_package")
    assert problems
    for complaint in complaints:
        assert complaint in "\n".join([*problems, output])
