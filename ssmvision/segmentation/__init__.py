"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""

from . import swin_umamba, vm_unet  # noqa: F401
