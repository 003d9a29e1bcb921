"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""

from . import vm_unet  # noqa: F401
