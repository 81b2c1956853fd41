"""What the convolutional networks share: a convolution with its batch norm, and the residual stages' bookkeeping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Triple = tuple[int, int, int]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU if asked for; any of the three may be folded or left out.

    Parameters
    ----------
    kernel, stride, padding : (time, height, width); ``padding`` is half the kernel unless given.
    groups : ``in_channels`` for a depthwise convolution.
    norm : whether there is a batch norm at all.
    eps : of the batch norm; public code bases differ (1e-5 or 1e-3) and the features with them.
    relu : whether a ReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        kernel: Triple = (1, 1, 1),
        stride: Triple = (1, 1, 1),
        padding: Triple | None = None,
        groups: int = 1,
        norm: bool = True,
        eps: float = 1e-5,
        relu: bool = True,
    ) -> None:
        super().__init__()
        time, height, width = kernel
        padding = (time // 2, height // 2, width // 2) if padding is None else padding
        self.conv = nn.Conv3d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn: nn.BatchNorm3d | None = nn.BatchNorm3d(channels, eps=eps) if norm else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) → (B, channels, T', H', W')"""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return x.relu_() if self.relu else x

    def fuse(self) -> None:
        """Fold the batch norm's running statistics into the convolution, in place."""
        if self.bn is None:
            return
        assert self.bn.running_var is not None
        assert self.bn.running_mean is not None
        scale = self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)  # (channels,)
        bias = self.bn.bias - self.bn.running_mean * scale
        self.conv.weight = nn.Parameter(self.conv.weight.detach() * scale.detach().view(-1, 1, 1, 1, 1))
        self.conv.bias = nn.Parameter(bias.detach())
        self.bn = None
