"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""

from . import (  # noqa: F401
    h_vmunet,
    lightm_unet,
    lkm_unet,
    nnmamba,
    segmamba,
    swin_umamba,
    ultralight_vm_unet,
    umamba,
    unet,
    upernet,
    vivim,
    vm_unet,
)
from ._encoder_weights import load_encoder

__all__ = ["load_encoder"]
