"""Operators: one public function and one definition each, several backends."""

from . import routes
from ._backend import backend_info
from .selective_scan import selective_scan

__all__ = ["backend_info", "routes", "selective_scan"]
