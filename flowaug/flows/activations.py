"""Elementwise activation functions, formulated for speed on a CPU in eager and in compiled mode."""

import torch
from torch import Tensor


def in_compiled_inference() -> bool:
    """Return whether ``torch.compile`` is tracing without gradients.

    The CPU backend of the compiler fuses elementwise operations. It needs other formulas than eager mode to be fast.
    """
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _approximate_exp_neg(n: Tensor) -> Tensor:
    """Approximate ``exp(−n)`` for ``n ≥ 0`` in float32, with an error of at most 6e-4.

    The result is the eighth power of a cubic polynomial in ``min(n, 8) / 8``. It needs only products and sums, while
    ``exp`` is a function call. The minimum uses ``relu``, which is one instruction; ``clamp`` takes several.
    """
    h = 1 - (1 - n.float() * 0.125).relu()
    root = 1 - h * (1 - h * (0.5 - h * (1 / 6)))
    return root.square().square().square()


def _elu(x: Tensor) -> Tensor:
    if not in_compiled_inference():
        return x.clamp(max=0).exp_().sub_(1).clamp_min_(x)

    n = (-x).relu()
    decay = _approximate_exp_neg(n) if x.dtype == torch.bfloat16 else n.neg().exp()
    return (x.relu() + (decay - 1)).to(x.dtype)


class _ELU(torch.autograd.Function):
    """ELU computed as ``max(x, exp(min(x, 0)) − 1)``.

    PyTorch's CPU kernel evaluates ``expm1`` for every element and is several times slower. The derivative is computed
    from the output, which the next layer saves anyway.
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
    """Compute the exponential linear unit (Clevert et al. 2016) of a tensor of any shape.

    In bfloat16, compiled and without gradients, the result is an approximation: its error is at most 6e-4 before
    rounding.
    """
    return _ELU.apply(x) if torch.is_grad_enabled() else _elu(x)


def tanh(x: Tensor) -> Tensor:
    """Compute the hyperbolic tangent of a tensor of any shape."""
    if in_compiled_inference():
        return 1 - 2 / ((2 * x).exp() + 1)
    return x.tanh()
