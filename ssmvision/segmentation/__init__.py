"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""

from . import h_vmunet, lightm_unet, swin_umamba, ultralight_vm_unet, vivim, vm_unet  # noqa: F401
