"""Golden cases of the official segmenters: outputs, features and gradients, through the tool that users have."""

from pathlib import Path

import pytest

from ssmvision.engine.verify import verify_case

PARITY = Path(__file__).parents[1] / "parity"
CASES = [
    "h_vmunet", "lightm_unet_2d", "lightm_unet_3d", "lkm_unet_2d", "lkm_unet_3d", "nnmamba_cls", "nnmamba_seg",
    "segmamba", "swin_umamba", "swin_umamba_d", "ultralight_vm_unet", "umamba_bot_2d", "umamba_bot_3d",
    "umamba_enc_2d", "umamba_enc_3d", "vivim", "vm_unet", "vm_unet_v2",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_official_code_is_matched(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVISION_BACKEND", "cpu")
    _check(case)


def test_official_code_is_matched_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVISION_BACKEND", "reference")
    _check("umamba_enc_2d")


def _check(case: str) -> None:
    result = verify_case(PARITY / case)
    assert set(result.worst) == {"output", "feature", "gradient"}, str(result)
    assert result.ok, str(result)
