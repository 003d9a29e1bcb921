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
from .s4 import S4Block, S4Conv, S4Kernel
from .s4d import S4D, S4DKernel
from .s4nd import S4ND
from .s5 import S5, S5Classifier, S5Encoder, S5Layer
from .spacetime import ClosedLoopSSM, CompanionSSM, ShiftSSM
from .spatial_ssm import StructureAwareSSM
from .ss2d import SS2D, AtrousSS2D, LocalSS2D, ScalarSS2D
from .ssm2d import SSM2D

__all__ = [
    "S4D",
    "S4ND",
    "S5",
    "SS2D",
    "SSM2D",
    "AtrousSS2D",
    "BiMamba",
    "ChannelAttention",
    "ClosedLoopSSM",
    "CompanionSSM",
    "GatedConv",
    "GroupedSS2D",
    "LocalMamba",
    "LocalSS2D",
    "Mamba",
    "MambaLikeLinearAttention",
    "MambaVisionMixer",
    "ModulatedGroupMamba",
    "NonCausalSSD",
    "S4Block",
    "S4Conv",
    "S4DKernel",
    "S4Kernel",
    "S5Classifier",
    "S5Encoder",
    "S5Layer",
    "ScalarSS2D",
    "ShiftSSM",
    "StructureAwareSSM",
]
