"""SSM layers: nn.Modules around the operators, initialized in `reset_parameters`."""

from .bimamba import BiMamba
from .gated_conv import GatedConv
from .linear_attention import MambaLikeLinearAttention
from .mamba import Mamba
from .mambavision_mixer import MambaVisionMixer
from .noncausal_ssd import NonCausalSSD
from .spatial_ssm import StructureAwareSSM
from .ss2d import SS2D, ScalarSS2D

__all__ = [
    "SS2D",
    "BiMamba",
    "GatedConv",
    "Mamba",
    "MambaLikeLinearAttention",
    "MambaVisionMixer",
    "NonCausalSSD",
    "ScalarSS2D",
    "StructureAwareSSM",
]
