"""Networks that read sequences, compared on one task: same data, same budget, same choice of learning rates."""

from .experiment import compare
from .networks import build_network
from .noise import fourier_noise, spike
from .report import table
from .tasks import Classification, Regression, Task, drift, pixels

__all__ = [
    "Classification", "Regression", "Task", "build_network", "compare", "drift", "fourier_noise", "pixels",
    "spike", "table",
]  # fmt: skip
