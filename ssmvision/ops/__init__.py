"""Operators: one public function and one definition each, several backends."""

from . import routes
from ._backend import backend_info
from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan

__all__ = ["backend_info", "causal_conv1d", "routes", "selective_scan"]
