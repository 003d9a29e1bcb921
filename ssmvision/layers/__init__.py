"""SSM layers: nn.Modules around the operators, initialized in `reset_parameters`."""

from .bimamba import BiMamba
from .channel_attention import ChannelAttention
from .gated_conv import GatedConv
from .grouped_ss2d import GroupedSS2D, ModulatedGroupMamba
from .linear_attention import MambaLikeLinearAttention
from .local_mamba import LocalMamba
from .mamba import Mamba
from .mambavision_mixer import MambaVisionMixer
from .noncausal_ssd import NonCausalSSD
from .spatial_ssm import StructureAwareSSM
from .ss2d import SS2D, AtrousSS2D, LocalSS2D, MultiScaleSS2D, ScalarSS2D

__all__ = [
    "SS2D",
    "AtrousSS2D",
    "BiMamba",
    "ChannelAttention",
    "GatedConv",
    "GroupedSS2D",
    "LocalMamba",
    "LocalSS2D",
    "Mamba",
    "MambaLikeLinearAttention",
    "MambaVisionMixer",
    "ModulatedGroupMamba",
    "MultiScaleSS2D",
    "NonCausalSSD",
    "ScalarSS2D",
    "StructureAwareSSM",
]
