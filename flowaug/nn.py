"""Conditioner networks: plain networks that know nothing of flows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ELU(torch.autograd.Function):
    """``max(x, 0) + e − 1`` with ``e = exp(min(x, 0))``, whose derivative is ``e`` on both sides of 0.

    PyTorch's CPU kernel evaluates ``expm1`` for every element and takes five times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        slope = x.clamp(max=0).exp_()
        ctx.save_for_backward(slope)
        return x.clamp(min=0).add_(slope).sub_(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def elu(x: Tensor) -> Tensor:
    """Exponential linear unit (Clevert et al. 2016) of a tensor of any shape."""
    return _ELU.apply(x)


class ScaledConv2d(nn.Module):
    """Convolution with a gain and a bias per output channel, initialised on data.

    ``y = gain · (w ∗ x) + bias``. The gain multiplies the weights, not the activations: it costs nothing per pixel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: 1 or 3; the spatial size is kept.
        zero: start with gain 0, so that the output is 0 whatever comes in.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False):
        super().__init__()
        fan_in = in_channels * kernel_size**2
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size) / fan_in**0.5)
        self.gain = nn.Parameter(torch.full((out_channels,), 0.0 if zero else 1.0))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.padding = kernel_size // 2
        self.zero = zero

    def scaled_weight(self) -> Tensor:
        """Weights with the gain folded in, (out, in, k, k)."""
        return self.weight * self.gain[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        return F.conv2d(x, self.scaled_weight().to(x.dtype), self.bias.to(x.dtype), padding=self.padding)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set gain and bias so that the outputs on ``x`` have mean 0 and variance 1 (Salimans & Kingma 2016)."""
        if not self.zero:
            raw = F.conv2d(x, self.weight, padding=self.padding)
            variance, mean = torch.var_mean(raw, (0, 2, 3), correction=0)
            self.gain.copy_((variance + 1e-6).rsqrt())
            self.bias.copy_(-mean * self.gain)
        return self(x)


class ResidualBlock(nn.Module):
    """``x + conv3(ELU(conv1(ELU(conv3(ELU(x))))))``; starts as the identity.

    Args:
        channels: width, kept.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ScaledConv2d(channels, channels, 3)
        self.conv2 = ScaledConv2d(channels, channels, 1)
        self.conv3 = ScaledConv2d(channels, channels, 3, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h = self.conv1(elu(x))
        h = self.conv2(elu(h))
        return x + self.conv3(elu(h))

    def initialise(self, x: Tensor) -> Tensor:
        """Data-dependent initialisation; returns the output on ``x``."""
        h = self.conv1.initialise(elu(x))
        h = self.conv2.initialise(elu(h))
        return x + self.conv3.initialise(elu(h))


class ConvConditioner(nn.Module):
    """Residual network of the MEF coupling (Xiao & Liu, ICML 2020): conv, ``blocks`` residual blocks, conv.

    Args:
        in_channels: channels of the half that conditions.
        out_channels: number of raw transformation parameters per pixel; they start at 0.
        hidden: width.
        blocks: number of residual blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, blocks: int):
        super().__init__()
        self.stem = ScaledConv2d(in_channels, hidden, 3)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden) for _ in range(blocks)))
        self.head = ScaledConv2d(hidden, out_channels, 3, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        return self.head(elu(self.blocks(self.stem(x))))

    def initialise(self, x: Tensor) -> Tensor:
        """Data-dependent initialisation; returns the output on ``x``."""
        h = self.stem.initialise(x)
        for block in self.blocks:
            h = block.initialise(h)
        return self.head.initialise(elu(h))
