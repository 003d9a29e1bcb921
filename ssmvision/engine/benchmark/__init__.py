"""Side-by-side timings: everything that is compared runs in turn, in one process, on the same inputs."""

from .limits import bandwidth_limit, exp_limit
from .models import build, model_call, peak_memory, resident, scan_share
from .operators import OPS, OpShape, measure_layers, measure_op, published_scan, time_growth
from .others import measure_others
from .processes import convs5_memory, instruction_set_ratio, training_memory
from .timing import Bar, hardware, interleaved

__all__ = [
    "OPS", "Bar", "OpShape", "bandwidth_limit", "build", "convs5_memory", "exp_limit", "hardware",
    "instruction_set_ratio", "interleaved", "measure_layers", "measure_op", "measure_others", "model_call",
    "peak_memory", "published_scan", "resident", "scan_share", "time_growth", "training_memory",
]  # fmt: skip
