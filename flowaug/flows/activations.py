"""Elementwise functions, in the formulas that eager and compiled code run soonest on a CPU."""

import torch
from torch import Tensor


def in_compiled_inference() -> bool:
    """Whether ``torch.compile`` traces this without gradients: what it fuses on a CPU wants formulas of its own."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _coarse_decay(n: Tensor) -> Tensor:
    """``exp(−n)`` of ``n ≥ 0`` within 6e-4: the eighth power of a cubic in ``min(n, 8) / 8``, in float32.

    That is products and sums alone, where ``exp`` is a call; and ``relu`` is one instruction, ``clamp`` several.
    """
    h = 1 - (1 - n.float() * 0.125).relu()
    root = 1 - h * (1 - h * (0.5 - h * (1 / 6)))
    return root.square().square().square()


def _elu(x: Tensor) -> Tensor:
    if not in_compiled_inference():
        return x.clamp(max=0).exp_().sub_(1).clamp_min_(x)
    n = (-x).relu()
    decay = _coarse_decay(n) if x.dtype == torch.bfloat16 else n.neg().exp()
    return (x.relu() + (decay - 1)).to(x.dtype)


class _ELU(torch.autograd.Function):
    """``max(x, exp(min(x, 0)) − 1)``; the derivative is read off the output, which the next layer keeps anyway.

    PyTorch's CPU kernel evaluates ``expm1`` for every element and takes several times as long.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        out = _elu(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, *ctx.saved_tensors)


def elu(x: Tensor) -> Tensor:
    """Exponential linear unit (Clevert et al. 2016) of a tensor of any shape.

    Compiled without gradients it is within 6e-4 of the exact value, and rounding, in bfloat16.
    """
    return _ELU.apply(x) if torch.is_grad_enabled() else _elu(x)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent of a tensor of any shape."""
    if in_compiled_inference():
        return 1 - 2 / ((2 * x).exp() + 1)
    return x.tanh()
