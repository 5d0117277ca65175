"""Slow literal twins: the formulas as written, one class and one sample at a time, in float64."""

import torch


def class_statistics(z, y, num_classes):
    """Mean and population variance of each class, from the samples themselves."""
    rows = [z[y == k].double() for k in range(num_classes)]
    return torch.stack([r.mean(0) for r in rows]), torch.stack([r.var(0, unbiased=False) for r in rows])


def gaussian_log_density(z, mean, variance):
    """log N(z; mean, diag(variance)) of one point (D,)."""
    covariance = torch.diag(variance.double())
    normal = torch.distributions.MultivariateNormal(mean.double(), covariance)
    return normal.log_prob(z.double())


def class_log_densities(z, mean, variance):
    """(B, K) log-densities, one pair at a time."""
    rows = [[gaussian_log_density(point, m, v) for m, v in zip(mean, variance, strict=True)] for point in z]
    return torch.tensor(rows, dtype=torch.float64)


def principal_axes(z, rank):
    """Axes (rank, D) and variances of one class, from the singular values of the centred samples."""
    centred = z.double() - z.double().mean(0)
    _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
    return axes[:rank], (singular.square() / len(z))[:rank]


def project_one_by_one(axes, mean, z, y):
    """U_y (z - mu_y), one sample at a time."""
    return torch.stack([axes[k].double() @ (p - mean[k]).double() for p, k in zip(z, y.tolist(), strict=True)])


def combine_one_by_one(axes, a, y):
    """U_yᵀ a, one sample at a time."""
    return torch.stack([axes[k].double().T @ c.double() for c, k in zip(a, y.tolist(), strict=True)])


def jacobian_ladj(bijection, x: torch.Tensor) -> torch.Tensor:
    """log|det ∂z/∂x| of each example by autograd's full Jacobian, (B,)."""
    ladjs = []
    for one in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: bijection(v[None])[0].flatten(), one)
        ladjs.append(torch.linalg.slogdet(jacobian.reshape(one.numel(), one.numel())).logabsdet)
    return torch.stack(ladjs)


def mix_one(z, y, pca, plan, i):
    """SPEC §4 for sample i of a plan, with the axes of its class as a plain matrix."""
    axes, mean = (t[y[i]].double() for t in (pca.axes, pca.mean))
    rank, w = plan.weight.shape[1], plan.weight[i].double()
    axes = axes[:rank]
    own = axes @ (z[i].double() - mean)
    if plan.source == "bank":
        other = pca.coords[plan.partner[i], :rank].double()
    elif plan.source == "batch":
        other = axes @ (z[plan.partner[i]].double() - mean)
    else:
        other = plan.noise[i].double() * pca.variance[y[i], :rank].double().sqrt()
    mixed = (1 - w) * own + w * other
    if plan.rescaled:
        mixed = mixed / ((1 - w) ** 2 + w**2).sqrt()
    return z[i].double() + axes.T @ (mixed - own)
