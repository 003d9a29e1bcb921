"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""

from . import lkm_unet, nnmamba, segmamba, umamba  # noqa: F401
