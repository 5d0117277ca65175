"""Exponentials: of one matrix in float64, and the action of those of small matrices on the vectors of all pixels."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowaug.flows.activations import in_compiled_inference

MAX_LOG = 2.0  # bound on every log-scale of a coupling, and on the norm of every matrix that it exponentiates
SQUARINGS, TERMS = 8, 12  # exact to float64 rounding for every matrix of norm up to 2^8 / 2


def _scaled_and_squared(matrix: Tensor) -> Tensor:
    scaled = matrix * 2.0**-SQUARINGS
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    result = eye + scaled / TERMS
    for k in range(TERMS - 1, 0, -1):
        result = eye + scaled @ result / k
    for _ in range(SQUARINGS):
        result = result @ result
    return result


class _Expm(torch.autograd.Function):
    """The derivative along G is the corner of ``exp([[M, G], [0, M]])`` (Van Loan 1978); its adjoint has Mᵀ for M."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return _scaled_and_squared(matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        size = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny)  # linear in G: keep the series in its range
        transposed, n = matrix.mT, matrix.shape[-1]
        upper = torch.cat([transposed, grad / size], -1)
        lower = torch.cat([torch.zeros_like(matrix), transposed], -1)
        return _scaled_and_squared(torch.cat([upper, lower], -2))[..., :n, n:] * size


def expm(matrix: Tensor) -> Tensor:
    """Matrix exponential in float64 with a fixed number of operations: no norm is read back, so nothing syncs.

    Args:
        matrix: (..., n, n), of norm up to about 100.

    Returns:
        ``exp(matrix)`` (..., n, n) in float64.
    """
    return _Expm.apply(matrix.double())


def taylor_terms(norm: float, dtype: torch.dtype) -> int:
    """Terms of the exponential series that reach rounding error for matrices of norm up to ``norm``."""
    remainder, terms = norm, 0
    while remainder > torch.finfo(dtype).eps / 100:
        terms += 1
        remainder *= norm / (terms + 1)
    return terms


class _Series(torch.autograd.Function):
    """``Σ_k t_k`` with ``t_0 = x`` and ``t_k = S t_{k−1} / (k + offset)``; backward costs one such sum more."""

    @staticmethod
    def forward(ctx, s: Tensor, x: Tensor, terms: int, offset: int) -> Tensor:
        parts = [x]
        for k in range(1, terms + 1):
            parts.append((s @ parts[-1]).div_(k + offset))
        parts = torch.cat(parts, -1)
        ctx.save_for_backward(s, parts)
        ctx.offset = offset
        return parts.sum(-1, keepdim=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        s, parts = ctx.saved_tensors
        adjoints, transposed = [grad], s.mT
        for k in range(parts.shape[-1] - 1, 0, -1):
            adjoints.append(torch.add(grad, transposed @ adjoints[-1], alpha=1 / (k + ctx.offset)))
        scales = torch.arange(parts.shape[-1] - 1, 0, -1, device=s.device, dtype=s.dtype) + ctx.offset
        adjoint = torch.cat(adjoints[:-1], -1) / scales
        return adjoint @ parts[..., :-1].flip(-1).mT, adjoints[-1], None, None


def series(s: Tensor, x: Tensor, terms: int, offset: int, product: Callable = torch.matmul) -> Tensor:
    """``Σ_k S^k x · offset! / (k + offset)!`` up to ``k = terms``: matrix times vector only.

    Args:
        s: matrices (..., c, c).
        x: vectors (..., c, 1).
        terms: where to stop.
        offset: 0 for the exponential, 1 for ``(exp(S) − 1) / S``.
        product: without gradients, multiplies ``s`` and ``x`` where they are laid out otherwise.
    """
    if torch.is_grad_enabled():
        return _Series.apply(s, x, terms, offset)
    total, term = x.clone(), x
    for k in range(1, terms + 1):
        term = product(s, term).div_(k + offset)
        total += term
    return total


def expm_action(s: Tensor, x: Tensor, norm: float = MAX_LOG) -> Tensor:
    """``exp(S) x`` by a fixed number of terms of the series of the action.

    Args:
        s: matrices (..., c, c).
        x: vectors (..., c, 1).
        norm: bound on the norm of ``s``.
    """
    return series(s, x, taylor_terms(norm, x.dtype), 0)


def to_pixels(x: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def from_pixels(pixels: Tensor, like: Tensor) -> Tensor:
    """Reshape (B·H·W, C) to the shape (B, C, H, W) of ``like``."""
    b, _, h, w = like.shape
    return pixels.view(b, h, w, -1).permute(0, 3, 1, 2)


def expm_of_pixels(s: Tensor, x: Tensor, norm: float) -> Tensor:
    """``exp(S) x`` at every pixel.

    Args:
        s: matrices (B, c², H, W).
        x: vectors (B, c, H, W).
        norm: bound on the norm of ``s``.
    """
    square = x.shape[1], x.shape[1]
    if in_compiled_inference():
        return series(_planes(s.unflatten(1, square)), x, taylor_terms(norm, x.dtype), 0, _product_of_planes)
    return from_pixels(expm_action(to_pixels(s).unflatten(1, square), to_pixels(x)[..., None], norm)[..., 0], x)


def _planes(x: Tensor) -> Tensor:
    """The same with the pixels of an entry beside each other; only ``as_strided`` holds the compiler to a layout."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _product_of_planes(s: Tensor, x: Tensor) -> Tensor:
    """Matrices (B, c, c, H, W) times vectors (B, c, H, W): one loop where compiled, slow elsewhere."""
    return _planes((s * x[:, None]).sum(2))
