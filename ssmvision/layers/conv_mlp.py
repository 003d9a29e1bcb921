"""An MLP that sees the neighbours of a pixel, as of GroupMamba (arXiv:2407.13772) and MSVMamba (arXiv:2405.14174)."""

from typing import Any, Type

from torch import Tensor, nn


class ConvMlp(nn.Module):
    """An MLP with a depthwise convolution before its activation.

    Args:
        dim: Channels of input and output.
        hidden: Channels in between.
        act_layer: Activation.
        residual: Add the convolution to its input, as MSVMamba does, in place of that.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        act_layer: Type[nn.Module] = nn.GELU,
        residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        x = self.fc1(x)
        mixed = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x + mixed if self.residual else mixed))
