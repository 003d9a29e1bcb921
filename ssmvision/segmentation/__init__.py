"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""

from . import nnmamba, segmamba, umamba  # noqa: F401
