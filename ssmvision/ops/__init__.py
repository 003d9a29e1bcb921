"""Operators: one public function and one definition each, several backends."""

from . import routes
from ._backend import backend_info, lowered_for_export
from .causal_conv1d import causal_conv1d, causal_conv1d_run, causal_conv1d_step
from .convs5_step import convs5_step, frame_conv_weight
from .fft_conv import fft_conv
from .frame_norm import frame_norm
from .linear_scan import linear_scan, linear_scan_step
from .selective_scan import selective_scan, selective_scan_step
from .selective_scan_2d import linear_scan_2d, selective_scan_2d
from .ssd_scan import resets_from_seq_idx, ssd_scan, ssd_scan_step

__all__ = [
    "backend_info",
    "causal_conv1d",
    "causal_conv1d_run",
    "causal_conv1d_step",
    "convs5_step",
    "fft_conv",
    "frame_conv_weight",
    "frame_norm",
    "linear_scan",
    "linear_scan_2d",
    "linear_scan_step",
    "lowered_for_export",
    "resets_from_seq_idx",
    "routes",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_step",
    "ssd_scan",
    "ssd_scan_step",
]
