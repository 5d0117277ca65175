"""Matrix exponentials: of one matrix in float64, and of small matrices per pixel, applied to the pixel vectors."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowaug.flows.activations import in_compiled_inference

MAX_LOG = 2.0  # bound on the log-scales of a coupling and on the norm of the matrices whose exponential it takes
SQUARINGS, TERMS = 8, 12  # accurate to float64 rounding for all matrices of norm up to 2^8 / 2


def _scale_and_square(matrix: Tensor) -> Tensor:
    """Compute the matrix exponential by scaling and squaring (Moler & Van Loan 2003)."""
    scaled = matrix * 2.0**-SQUARINGS
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)

    result = eye + scaled / TERMS  # Taylor series by Horner's method
    for k in range(TERMS - 1, 0, -1):
        result = eye + scaled @ result / k

    for _ in range(SQUARINGS):
        result = result @ result
    return result


class _Expm(torch.autograd.Function):
    """Matrix exponential with an exact gradient.

    The derivative in the direction G is the upper right block of ``exp([[M, G], [0, M]])`` (Van Loan 1978). For the
    gradient the adjoint of this map is needed, which is the same expression with Mᵀ instead of M.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return _scale_and_square(matrix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        # The result is linear in the gradient, so the gradient is normalised to stay in the range of the series.
        size = grad.abs().amax().clamp(min=torch.finfo(grad.dtype).tiny)
        transposed = matrix.mT
        upper = torch.cat([transposed, grad / size], -1)
        lower = torch.cat([torch.zeros_like(matrix), transposed], -1)
        n = matrix.shape[-1]
        return _scale_and_square(torch.cat([upper, lower], -2))[..., :n, n:] * size


def expm(matrix: Tensor) -> Tensor:
    """Compute the matrix exponential in float64.

    Unlike in ``torch.matrix_exp``, the number of operations does not depend on the norm of the matrix. The norm is
    therefore not copied to the host, and a GPU is not synchronised.

    Args:
        matrix: matrices (..., n, n) with a norm of at most about 100.

    Returns:
        ``exp(matrix)`` (..., n, n) in float64.
    """
    return _Expm.apply(matrix.double())


def taylor_terms(norm: float, dtype: torch.dtype) -> int:
    """Return the number of terms of the exponential series that is accurate to rounding for a bounded norm.

    Args:
        norm: upper bound on the norm of the matrices.
        dtype: floating-point type of the computation.
    """
    remainder = norm
    terms = 0
    while remainder > torch.finfo(dtype).eps / 100:
        terms += 1
        remainder *= norm / (terms + 1)
    return terms


class _Series(torch.autograd.Function):
    """Sum ``Σ_k t_k`` with ``t_0 = x`` and ``t_k = S t_{k−1} / (k + offset)``.

    The backward pass computes one more sum of this form, with Sᵀ.
    """

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
        transposed = s.mT
        adjoints = [grad]
        for k in range(parts.shape[-1] - 1, 0, -1):
            adjoints.append(torch.add(grad, transposed @ adjoints[-1], alpha=1 / (k + ctx.offset)))

        scales = torch.arange(parts.shape[-1] - 1, 0, -1, device=s.device, dtype=s.dtype) + ctx.offset
        adjoint = torch.cat(adjoints[:-1], -1) / scales
        return adjoint @ parts[..., :-1].flip(-1).mT, adjoints[-1], None, None


def series(s: Tensor, x: Tensor, terms: int, offset: int, product: Callable = torch.matmul) -> Tensor:
    """Compute the series ``Σ_k S^k x · offset! / (k + offset)!`` for ``k = 0 … terms``.

    It needs matrix-vector products only.

    Args:
        s: matrices (..., c, c).
        x: vectors (..., c, 1).
        terms: last index k.
        offset: 0 for ``exp(S) x``, 1 for ``((exp(S) − 1) / S) x``.
        product: computes the product of ``s`` and ``x``, for other memory layouts. Ignored if gradients are enabled.

    Returns:
        Vectors in the shape of ``x``.
    """
    if torch.is_grad_enabled():
        return _Series.apply(s, x, terms, offset)

    total = x.clone()
    term = x
    for k in range(1, terms + 1):
        term = product(s, term).div_(k + offset)
        total += term
    return total


def expm_action(s: Tensor, x: Tensor, norm: float = MAX_LOG) -> Tensor:
    """Compute ``exp(S) x`` without forming ``exp(S)``.

    The number of terms of the series depends on ``norm`` only, not on the values of ``s``.

    Args:
        s: matrices (..., c, c).
        x: vectors (..., c, 1).
        norm: upper bound on the norm of ``s``.

    Returns:
        Vectors (..., c, 1).
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
    """Compute ``exp(S) x`` at every pixel.

    Args:
        s: matrices (B, c², H, W).
        x: vectors (B, c, H, W).
        norm: upper bound on the norm of ``s``.

    Returns:
        Vectors (B, c, H, W).
    """
    square = x.shape[1], x.shape[1]
    if in_compiled_inference():
        matrices = _channels_first(s.unflatten(1, square))
        return series(matrices, x, taylor_terms(norm, x.dtype), 0, _multiply_channels_first)

    matrices = to_pixels(s).unflatten(1, square)
    return from_pixels(expm_action(matrices, to_pixels(x)[..., None], norm)[..., 0], x)


def _channels_first(x: Tensor) -> Tensor:
    """Return ``x`` in contiguous memory, where the pixels of a channel are adjacent.

    ``as_strided`` is needed because the compiler can change the layout after ``contiguous`` alone.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def _multiply_channels_first(s: Tensor, x: Tensor) -> Tensor:
    """Multiply matrices (B, c, c, H, W) and vectors (B, c, H, W).

    The compiler fuses this into one loop. In eager mode it is slow.
    """
    return _channels_first((s * x[:, None]).sum(2))
