"""SSM layers: nn.Modules around the operators, initialized in `reset_parameters`."""

from .bimamba import BiMamba
from .channel_attention import ChannelAttention
from .fscil import FSCILNeck
from .gated_conv import GatedConv
from .grouped_ss2d import GroupedSS2D, ModulatedGroupMamba
from .hiss import Hierarchical, Level, MambaStack, S4Stack
from .hydra import Hydra
from .linear_attention import MambaLikeLinearAttention
from .local_mamba import LocalMamba
from .mamba import Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .mambavision_mixer import MambaVisionMixer
from .motion_mamba import BidirectionalSpatialMamba, HierarchicalTemporalMamba, MotionMambaUNet
from .noncausal_ssd import NonCausalSSD
from .smamba import SMambaLayer
from .spatial_ssm import StructureAwareSSM
from .ss2d import SS2D, AtrousSS2D, LocalSS2D, ScalarSS2D

__all__ = [
    "SS2D",
    "AtrousSS2D",
    "BiMamba",
    "BidirectionalSpatialMamba",
    "ChannelAttention",
    "FSCILNeck",
    "GatedConv",
    "GroupedSS2D",
    "Hierarchical",
    "HierarchicalTemporalMamba",
    "Hydra",
    "Level",
    "LocalMamba",
    "LocalSS2D",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLikeLinearAttention",
    "MambaStack",
    "MambaVisionMixer",
    "ModulatedGroupMamba",
    "MotionMambaUNet",
    "NonCausalSSD",
    "S4Stack",
    "SMambaLayer",
    "ScalarSS2D",
    "StructureAwareSSM",
]
