"""Conditioner networks: ordinary networks, independent of flows.

A conditioner is built as ``network(in_channels, out_channels, **sizes)``. Its output is 0 at initialisation. If some of
its parameters are initialised on data, it has a method ``initialise(x)``.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.activations import elu

# Backend of float32 linear layers on a CPU: "blas", or "onednn" for 1×1 convolutions, up to twice as fast on AMD.
LINEAR_BACKEND = "onednn"


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b`` in the dtype of ``x``, with the backend ``LINEAR_BACKEND``.

    Args:
        x: tokens (B, n, in).
        weight: weights (out, in).
        bias: bias (out,).

    Returns:
        Tokens (B, n, out).
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if LINEAR_BACKEND == "onednn" and x.device.type == "cpu" and x.dtype == torch.float32:
        # Both permutations are views: (B, in, n, 1) in channels-last memory is (B, n, in) in contiguous memory.
        pixels = x[:, :, None].permute(0, 3, 1, 2)
        return F.conv2d(pixels, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[:, :, 0]
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """Linear layer on tokens, initialised with weights of standard deviation ``1/√in``.

    Args:
        in_features: size of an input token.
        out_features: size of an output token.
        zero: initialise the weights with 0.
    """

    def __init__(self, in_features: int, out_features: int, zero: bool = False):
        super().__init__()
        weight = torch.zeros if zero else torch.randn
        self.weight = nn.Parameter(weight(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, n, in) to (B, n, out)."""
        return linear(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017).

    Args:
        width: size of a token; a multiple of ``heads``.
        heads: number of heads.
        zero: initialise the output projection with 0.

    Raises:
        ValueError: if ``heads`` is below 1 or does not divide ``width``.
    """

    def __init__(self, width: int, heads: int, zero: bool = False):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"attention of width {width} cannot have {heads} heads; the number of heads must divide the width"
            )
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, n, width) to the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PixelAttention(nn.Module):
    """Residual self-attention over all pixels of an image, ``x + attention(norm(x))``; the identity at initialisation.

    Args:
        channels: number of input and output channels; a multiple of ``heads``.
        heads: number of heads.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        tokens = self.attention(self.norm(x.flatten(2).transpose(1, 2)))
        return x + tokens.transpose(1, 2).reshape(x.shape)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP of four times the width, both with a skip connection.

    Args:
        width: size of a token.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, n, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TransformerConditioner(nn.Module):
    """Vision transformer of the Jet coupling (Kolesnikov et al. 2024; Dosovitskiy et al. 2021).

    Args:
        in_channels: size of an input token.
        out_channels: size of an output token; the output is 0 at initialisation.
        tokens: number of tokens n.
        width: size of a token inside the network.
        depth: number of encoder blocks.
        heads: number of heads.
    """

    def __init__(self, in_channels: int, out_channels: int, tokens: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embed = Linear(in_channels, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, out_channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, n, in) to (B, n, out)."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))


class ScaledConv2d(nn.Module):
    """Convolution with a gain and a bias per output channel, initialised on data: ``y = gain · (w ∗ x) + bias``.

    The gain is multiplied into the weights, not the activations, so it adds no cost per pixel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: 1 or 3; padding preserves the spatial size.
        zero: initialise the gain with 0, so that the output is 0 for every input.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, zero: bool = False):
        super().__init__()
        fan_in = in_channels * kernel_size**2
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size) / fan_in**0.5
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.gain = nn.Parameter(torch.full((out_channels,), 0.0 if zero else 1.0))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.padding = kernel_size // 2
        self.zero = zero

    def scaled_weight(self) -> Tensor:
        """Return the weights (out, in, k, k), multiplied by the gain."""
        return self.weight * self.gain[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        return F.conv2d(x, self.scaled_weight().to(x.dtype), self.bias.to(x.dtype), padding=self.padding)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set gain and bias so that the outputs on ``x`` have mean 0 and variance 1 per channel.

        With ``zero=True`` the parameters are left unchanged. Source: Salimans & Kingma, "Weight Normalization", 2016.

        Args:
            x: images (B, in, H, W).

        Returns:
            The output (B, out, H, W) on ``x``.
        """
        if not self.zero:
            raw = F.conv2d(x, self.weight, padding=self.padding)
            variance, mean = torch.var_mean(raw, (0, 2, 3), correction=0)
            self.gain.copy_((variance + 1e-6).rsqrt())
            self.bias.copy_(-mean * self.gain)
        return self(x)


class ResidualBlock(nn.Module):
    """Residual block with convolutions of size 3, 1 and 3, each after an ELU; the identity at initialisation.

    Args:
        channels: number of input, hidden and output channels.
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
        """Initialise the parameters on ``x`` (B, C, H, W) and return the output on ``x``."""
        h = self.conv1.initialise(elu(x))
        h = self.conv2.initialise(elu(h))
        return x + self.conv3.initialise(elu(h))


class ImageConditioner(nn.Module):
    """Base class of the conditioners of a ``Coupling``, with ``hidden`` channels between its layers."""

    hidden: int

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the parameters on ``x`` (B, in, H, W) and return the output on ``x``."""
        raise NotImplementedError


class ConvConditioner(ImageConditioner):
    """Residual network of the MEF coupling (Xiao & Liu 2020): convolution, residual blocks, convolution.

    Args:
        in_channels: channels of the conditioning half.
        out_channels: number of raw transformation parameters per pixel; the output is 0 at initialisation.
        hidden: number of hidden channels.
        blocks: number of residual blocks.
        attention: apply self-attention over the pixels between the last block and the last convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, blocks: int, attention: bool = False):
        super().__init__()
        self.hidden = hidden
        self.stem = ScaledConv2d(in_channels, hidden, 3)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden) for _ in range(blocks)))
        self.attention = PixelAttention(hidden) if attention else nn.Identity()
        self.head = ScaledConv2d(hidden, out_channels, 3, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        return self.head(elu(self.attention(self.blocks(self.stem(x)))))

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the parameters on ``x`` (B, in, H, W) and return the output on ``x``."""
        h = self.stem.initialise(x)
        for block in cast(Iterable[ResidualBlock], self.blocks):
            h = block.initialise(h)

        return self.head.initialise(elu(self.attention(h)))


class PlainConditioner(ImageConditioner):
    """Convolutions with ReLU between them; with 1×1 kernels on a 1×1 image, a multilayer perceptron.

    Args:
        in_channels: channels of the conditioning half.
        out_channels: number of raw transformation parameters per pixel; the output is 0 at initialisation.
        hidden: number of hidden channels.
        kernels: size of each kernel; (3, 1, 3) is the network of Glow (Kingma & Dhariwal 2018, Section 4).
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, kernels: tuple[int, ...]):
        super().__init__()
        self.hidden = hidden
        widths = [in_channels] + [hidden] * (len(kernels) - 1)
        layers = [ScaledConv2d(width, hidden, kernel) for width, kernel in zip(widths[:-1], kernels[:-1], strict=True)]
        head = ScaledConv2d(widths[-1], out_channels, kernels[-1], zero=True)
        self.layers = cast(Sequence[ScaledConv2d], nn.ModuleList([*layers, head]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the parameters on ``x`` (B, in, H, W) and return the output on ``x``."""
        for layer in self.layers[:-1]:
            x = F.relu(layer.initialise(x))
        return self.layers[-1].initialise(x)
