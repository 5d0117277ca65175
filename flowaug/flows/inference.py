"""The inference form of a flow: whatever does not depend on the input is computed once.

Gains are folded into convolutions, matrix exponentials and inverses are formed both ways, an ActNorm and the 1×1
convolution after it become one affine map, and all log-determinants that are constants become one number per step.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.bijections import ActNorm, Bijection, Chain, Coupling
from flowaug.flows.bijections.base import Conditioned, Piecewise
from flowaug.flows.bijections.linear import Conv1x1, apply_matrix
from flowaug.flows.networks import ScaledConv2d

ROOM = 2  # times as large pieces where they are compiled: fused elementwise work passes through memory less often
RECOMPILE_LIMIT = 64  # levels times powers of two; each is compiled once


class FixedMatrix(Bijection):
    """``z = W (scale · x + offset)`` per pixel, with constants: an ActNorm and the 1×1 convolution after it.

    Args:
        norm: the ActNorm.
        conv: the convolution, of the same channels.
    """

    def __init__(self, norm: ActNorm, conv: Conv1x1):
        super().__init__()
        log_scale, matrix = norm.bounded_log_scale(), conv.matrix()
        pixels = norm.repeats * log_scale.numel() // len(matrix)
        self.register_buffer("scale", log_scale.exp())
        self.register_buffer("offset", -norm.shift * self.scale)
        self.register_buffer("unscale", (-log_scale).exp())
        self.register_buffer("shift", norm.shift.clone())
        self.register_buffer("matrix", matrix.to(log_scale.dtype))
        self.register_buffer("inverse_matrix", conv.inverse_matrix().to(log_scale.dtype))
        self.register_buffer("ladj", norm.repeats * log_scale.sum() + pixels * conv.log_det())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        return apply_matrix(self.matrix, torch.addcmul(self.offset, x, self.scale)), self.ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Undo."""
        return torch.addcmul(self.shift, apply_matrix(self.inverse_matrix, z), self.unscale)


class FixedStep(Piecewise):
    """A fixed matrix and the coupling after it, one piece of the batch at a time.

    Args:
        matrix: comes first.
        coupling: decides about the pieces.
    """

    def __init__(self, matrix: FixedMatrix, coupling: Coupling):
        super().__init__()
        self.matrix, self.coupling = matrix, coupling

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """Those of the coupling."""
        return self.coupling.pieces(x)

    def forward_piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        x, ladj = self.matrix(x)
        z, more = self.coupling.forward_piece(x)
        return z, ladj + more

    def inverse_piece(self, z: Tensor) -> Tensor:
        """Undo."""
        return self.matrix.inverse(self.coupling.inverse_piece(z))


class FoldedConv2d(nn.Module):
    """A convolution whose gain is in its weights.

    Args:
        conv: the convolution with a gain.
    """

    def __init__(self, conv: ScaledConv2d):
        super().__init__()
        self.register_buffer("weight", conv.scaled_weight())
        self.register_buffer("bias", conv.bias.clone())
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W)."""
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


@torch.no_grad()
def freeze(bijection: Bijection, conditioner_dtype: torch.dtype | None = None, compiled: bool = False) -> Bijection:
    """A copy of a bijection that computes the same, faster, and cannot be trained.

    Args:
        bijection: left as it is.
        conditioner_dtype: dtype to run the conditioners in, None for that of their parameters.
        compiled: compile every step with ``torch.compile``, when it is first used.
    """
    bijection = copy.deepcopy(bijection).requires_grad_(False).eval()
    for module in list(bijection.modules()):
        if isinstance(module, Conditioned):
            _freeze_conditioner(module, conditioner_dtype)
        if isinstance(module, Chain):
            module.bijections = nn.ModuleList(_fused(module.bijections))
            if compiled:
                _compile(module)
    return bijection


def _freeze_conditioner(coupling: Conditioned, dtype: torch.dtype | None) -> None:
    coupling.conditioner_dtype, coupling.recompute = dtype, False
    for module in list(coupling.conditioner.modules()):
        for name, child in module.named_children():
            if isinstance(child, ScaledConv2d):
                setattr(module, name, FoldedConv2d(child))
    coupling.conditioner.to(dtype)
    for module in coupling.modules():
        if hasattr(module, "tighten"):
            module.tighten()


def _compile(chain: Chain) -> None:
    for bijection in chain.bijections:
        if isinstance(bijection, FixedStep):
            bijection.coupling.cache *= ROOM
        if isinstance(bijection, Piecewise):
            bijection.forward_piece = _compiled(bijection.forward_piece)
            bijection.inverse_piece = _compiled(bijection.inverse_piece)


def _compiled(function: Callable) -> Callable:
    """``torch.compile`` for fixed shapes: the batch is filled up to a power of two, so that few shapes arise."""
    compiled = torch.compile(function, dynamic=False, options=_fused_products())

    def call(x: Tensor):
        missing = (1 << (len(x) - 1).bit_length()) - len(x)
        filled = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            out = compiled(filled)
        return out[: len(x)] if isinstance(out, Tensor) else tuple(part[: len(x)] for part in out)

    return call


def _fused_products() -> dict[str, str]:
    """Compiler option: a product and the sum it goes into are one instruction; nothing where the user set another."""
    from torch._inductor import config  # takes a second, and only compiled flows need it

    name = "enable_floating_point_contract_flag"
    return {f"cpp.{name}": "fast"} if getattr(config.cpp, name, None) == "off" else {}


def _fused(bijections: Iterable[Bijection]) -> list[Bijection]:
    """The same map with every ActNorm merged into the 1×1 convolution after it, both into a step with the coupling."""
    out: list[Bijection] = []
    for bijection in bijections:
        if isinstance(bijection, Conv1x1) and out and isinstance(out[-1], ActNorm):
            bijection = FixedMatrix(out.pop(), bijection)
        if isinstance(bijection, Coupling) and out and isinstance(out[-1], FixedMatrix):
            bijection = FixedStep(out.pop(), bijection)
        out.append(bijection)
    return out
