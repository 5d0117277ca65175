"""Conversion of a trained flow for inference: everything that does not depend on the input is computed once.

* Gains are multiplied into the weights of their convolutions.
* The matrices of 1×1 convolutions and their inverses are computed once.
* An ActNorm and the 1×1 convolution after it become one affine map.
* The log-determinants of a step that do not depend on the input become one constant.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.bijections import ActNorm, Bijection, Chain, Coupling
from flowaug.flows.bijections.base import Chunked, ConditionedBijection
from flowaug.flows.bijections.coupling import CouplingTransform
from flowaug.flows.bijections.linear import Conv1x1, apply_matrix
from flowaug.flows.networks import ScaledConv2d

# Compiled chunks are this much larger: fused elementwise operations read and write memory less often.
COMPILED_CHUNK_FACTOR = 2
RECOMPILE_LIMIT = 64  # compiled variants of a step: one per level and chunk size, which is a power of two


class FixedMatrix(Bijection):
    """An ActNorm and the 1×1 convolution after it, as one map ``z = W (scale · x + offset)`` with constants.

    Args:
        norm: the ActNorm.
        conv: the 1×1 convolution, with the same number of channels.
    """

    scale: Tensor
    offset: Tensor
    unscale: Tensor
    shift: Tensor
    matrix: Tensor
    inverse_matrix: Tensor
    ladj: Tensor

    def __init__(self, norm: ActNorm, conv: Conv1x1):
        super().__init__()
        log_scale = norm.bounded_log_scale()
        matrix = conv.matrix()
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
        z = apply_matrix(self.matrix, torch.addcmul(self.offset, x, self.scale))
        return z, self.ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, C, H, W) back to ``x``."""
        return torch.addcmul(self.shift, apply_matrix(self.inverse_matrix, z), self.unscale)


class FixedStep(Chunked):
    """A ``FixedMatrix`` and the coupling after it, run chunk by chunk.

    Args:
        matrix: the affine map, applied first.
        coupling: the coupling; it determines the chunk size.
    """

    def __init__(self, matrix: FixedMatrix, coupling: Coupling):
        super().__init__()
        self.matrix = matrix
        self.coupling = coupling

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split a batch into the chunks of the coupling."""
        return self.coupling.chunks(x)

    def forward_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        x, matrix_ladj = self.matrix(x)
        z, coupling_ladj = self.coupling.forward_chunk(x)
        return z, matrix_ladj + coupling_ladj

    def inverse_chunk(self, z: Tensor) -> Tensor:
        """Map (B, C, H, W) back to ``x``."""
        return self.matrix.inverse(self.coupling.inverse_chunk(z))


class FoldedConv2d(nn.Module):
    """Convolution with the gain multiplied into its weights.

    Args:
        conv: the convolution with a separate gain.
    """

    weight: Tensor
    bias: Tensor

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
    """Return a copy of a bijection optimised for inference: same outputs, faster, not trainable.

    Args:
        bijection: the bijection; it is not changed.
        conditioner_dtype: dtype in which the conditioners run; None for the dtype of their parameters.
        compiled: compile every step with ``torch.compile`` at its first use.

    Returns:
        The copy, in eval mode and without gradients.
    """
    bijection = copy.deepcopy(bijection).requires_grad_(False).eval()
    for module in list(bijection.modules()):
        if isinstance(module, ConditionedBijection):
            _freeze_conditioner(module, conditioner_dtype)
        if isinstance(module, Chain):
            module.bijections = cast(Sequence[Bijection], nn.ModuleList(_fuse_steps(module.bijections)))
            if compiled:
                _compile_chunks(module)
    return bijection


def _freeze_conditioner(coupling: ConditionedBijection, dtype: torch.dtype | None) -> None:
    coupling.conditioner_dtype = dtype
    coupling.grad_checkpointing = False
    for module in list(coupling.conditioner.modules()):
        for name, child in module.named_children():
            if isinstance(child, ScaledConv2d):
                setattr(module, name, FoldedConv2d(child))

    coupling.conditioner.to(dtype)
    for module in coupling.modules():
        if isinstance(module, CouplingTransform):
            module.shrink_norm_bound()


def _compile_chunks(chain: Chain) -> None:
    """Compile, in place, the functions that process one chunk."""
    for bijection in chain.bijections:
        if isinstance(bijection, FixedStep):
            bijection.coupling.cache *= COMPILED_CHUNK_FACTOR
        if isinstance(bijection, Chunked):
            bijection.forward_chunk = _compile_padded(bijection.forward_chunk)
            bijection.inverse_chunk = _compile_padded(bijection.inverse_chunk)


def _compile_padded(function: Callable) -> Callable:
    """Compile a function of a batch for static shapes.

    The batch is padded to a power of two, so that the function is compiled for few batch sizes.
    """
    compiled = torch.compile(function, dynamic=False, options=_fused_multiply_add())
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch < 2.7

    def call(x: Tensor):
        missing = (1 << (len(x) - 1).bit_length()) - len(x)
        padded = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
        with torch._dynamo.config.patch({limit: RECOMPILE_LIMIT}):
            out = compiled(padded)
        return out[: len(x)] if isinstance(out, Tensor) else tuple(tensor[: len(x)] for tensor in out)

    return call


def _fused_multiply_add() -> dict[str, Any]:
    """Return the compiler options that enable fused multiply-add, or none if the user changed the setting."""
    from torch._inductor import config  # slow to import, and only compiled flows need it

    name = "enable_floating_point_contract_flag"
    return {f"cpp.{name}": "fast"} if getattr(config.cpp, name, None) == "off" else {}


def _fuse_steps(bijections: Iterable[Bijection]) -> list[Bijection]:
    """Merge every ActNorm with the 1×1 convolution after it, and both with the coupling after them."""
    out: list[Bijection] = []
    for bijection in bijections:
        last = out[-1] if out else None
        if isinstance(bijection, Conv1x1) and isinstance(last, ActNorm):
            out[-1] = FixedMatrix(last, bijection)
        elif isinstance(bijection, Coupling) and isinstance(last, FixedMatrix):
            out[-1] = FixedStep(last, bijection)
        else:
            out.append(bijection)
    return out
