"""SSM layers: nn.Modules around the operators, initialized in `reset_parameters`."""

from .bimamba import BiMamba
from .ss2d import SS2D, ScalarSS2D

__all__ = ["SS2D", "BiMamba", "ScalarSS2D"]
