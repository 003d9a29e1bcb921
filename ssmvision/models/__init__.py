"""One file per family; importing this package registers them all with timm."""

from . import (
    convs5,
    efficientvmamba,
    groupmamba,
    localvim,
    localvmamba,
    mamba_reg,
    mambavision,
    medmamba,
    mlla,
    msvmamba,
    plainmamba,
    spatial_mamba,
    videomamba,
    vim,
    vmamba,
    vssd,
)

__all__ = [
    "convs5",
    "efficientvmamba",
    "groupmamba",
    "localvim",
    "localvmamba",
    "mamba_reg",
    "mambavision",
    "medmamba",
    "mlla",
    "msvmamba",
    "plainmamba",
    "spatial_mamba",
    "videomamba",
    "vim",
    "vmamba",
    "vssd",
]
