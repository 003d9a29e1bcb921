"""SSM layers: nn.Modules around the operators, initialized in `reset_parameters`."""

from .bimamba import BiMamba
from .channel_attention import ChannelAttention
from .chimera import Chimera
from .conv_lstm import ConvLSTM
from .convs5 import ConvS5
from .fscil import ETFHead, FSCILNeck
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
from .s4 import S4Block, S4Conv, S4Kernel
from .s4d import S4D, S4DKernel
from .s4nd import S4ND
from .s5 import S5, S5Classifier, S5Encoder, S5Layer
from .smamba import SMambaLayer
from .spacetime import ClosedLoopSSM, CompanionSSM, ShiftSSM
from .spatial_ssm import StructureAwareSSM
from .ss2d import SS2D, AtrousSS2D, LocalSS2D, MultiScaleSS2D, ScalarSS2D
from .ssm2d import SSM2D
from .token_dynamics import ImportanceOrder, TiedProjection, constrain_input_output
from .trimamba import TriMamba

__all__ = [
    "S4D",
    "S4ND",
    "S5",
    "SS2D",
    "SSM2D",
    "AtrousSS2D",
    "BiMamba",
    "BidirectionalSpatialMamba",
    "ChannelAttention",
    "Chimera",
    "ClosedLoopSSM",
    "CompanionSSM",
    "ConvLSTM",
    "ConvS5",
    "ETFHead",
    "FSCILNeck",
    "GatedConv",
    "GroupedSS2D",
    "Hierarchical",
    "HierarchicalTemporalMamba",
    "Hydra",
    "ImportanceOrder",
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
    "MultiScaleSS2D",
    "NonCausalSSD",
    "S4Block",
    "S4Conv",
    "S4DKernel",
    "S4Kernel",
    "S4Stack",
    "S5Classifier",
    "S5Encoder",
    "S5Layer",
    "SMambaLayer",
    "ScalarSS2D",
    "ShiftSSM",
    "StructureAwareSSM",
    "TiedProjection",
    "TriMamba",
    "constrain_input_output",
]
