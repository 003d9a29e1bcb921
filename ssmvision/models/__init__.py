"""One file per family; importing this package registers them all with timm."""

from . import vmamba

__all__ = ["vmamba"]
