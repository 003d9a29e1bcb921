"""A vision model zoo built on state space models, registered into timm's registry."""

from ssmvision._version import __version__
from ssmvision.registry import create_model, is_model, list_models

__all__ = ["__version__", "create_model", "is_model", "list_models"]
