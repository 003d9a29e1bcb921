"""Trained weights as a folder that timm, transformers and `ssmvision.create_model` load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn


def export_folder(
    model: nn.Module, folder: str | Path, data_config: dict[str, Any], label_names: Sequence[str] | None = None
) -> Path:
    """Writes `config.json` and `model.safetensors`, replacing an earlier export at once.

    Load it with `ssmvision.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        model: A model from `create_model`, with the weights to publish.
        folder: Where to write.
        data_config: The preprocessing that the weights were validated with.
        label_names: Class names in order.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    model_config = {"label_names": list(label_names)} if label_names else None
    model.to(memory_format=torch.contiguous_format)  # safetensors stores no other order
    save_for_hf(model, str(partial), model_config=model_config, safe_serialization=True, data_config=data_config)
    config_path = partial / "config.json"
    config = json.loads(config_path.read_text())
    # num_classes stays at the top level: transformers fails when model_args repeats it.
    config.get("model_args", {}).pop("num_classes", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    for name in ("config.json", "model.safetensors"):
        folder.mkdir(exist_ok=True)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)
    return folder
