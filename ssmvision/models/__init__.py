"""One file per family; importing this package registers them all with timm."""

from . import mambavision, mlla, spatial_mamba, videomamba, vim, vmamba, vssd

__all__ = ["mambavision", "mlla", "spatial_mamba", "videomamba", "vim", "vmamba", "vssd"]
