"""Segmentation networks (and what was published with them), one file per family; importing it registers them all."""
from . import umamba as umamba
