"""One file per family; importing this package registers them all with timm."""

from . import vim, vmamba

__all__ = ["vim", "vmamba"]
