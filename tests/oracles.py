"""Slow reference implementations: the formulas as published, one class or one sample at a time, in float64."""

import torch


def class_statistics(z, y, num_classes):
    """Compute mean and population variance of each class from the samples, ``(K, D)`` each."""
    rows = [z[y == k].double() for k in range(num_classes)]
    return torch.stack([r.mean(0) for r in rows]), torch.stack([r.var(0, unbiased=False) for r in rows])


def gaussian_log_density(z, mean, variance):
    """Compute ``log N(z; mean, diag(variance))`` of one point ``(D,)``."""
    covariance = torch.diag(variance.double())
    normal = torch.distributions.MultivariateNormal(mean.double(), covariance)
    return normal.log_prob(z.double())


def class_log_densities(z, mean, variance):
    """Compute the log-density of each sample under each Gaussian, one pair at a time, ``(B, K)``."""
    rows = [[gaussian_log_density(point, m, v) for m, v in zip(mean, variance, strict=True)] for point in z]
    return torch.tensor(rows, dtype=torch.float64)


def principal_axes(z, rank):
    """Compute principal axes ``(rank, D)`` and variances ``(rank,)`` of one class by SVD of the centered samples."""
    centered = z.double() - z.double().mean(0)
    _, singular, axes = torch.linalg.svd(centered, full_matrices=False)
    return axes[:rank], (singular.square() / len(z))[:rank]


def project_one_by_one(axes, mean, z, y):
    """Compute ``U_y (z - mu_y)``, one sample at a time."""
    return torch.stack([axes[k].double() @ (p - mean[k]).double() for p, k in zip(z, y.tolist(), strict=True)])


def combine_one_by_one(axes, a, y):
    """Compute ``U_yᵀ a``, one sample at a time."""
    return torch.stack([axes[k].double().T @ c.double() for c, k in zip(a, y.tolist(), strict=True)])


def jacobian_ladj(bijection, x: torch.Tensor) -> torch.Tensor:
    """Compute ``log|det ∂z/∂x|`` of each example from the full Jacobian by autograd, ``(B,)``."""
    ladjs = []
    for one in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: bijection(v[None])[0].flatten(), one)
        ladjs.append(torch.linalg.slogdet(jacobian.reshape(one.numel(), one.numel())).logabsdet)
    return torch.stack(ladjs)


def mix_one(z, y, pca, plan, i):
    """Mix sample ``i`` of a plan with its partner: ``z + Uᵀ (mixed - own)`` with coordinates ``own = U (z - mu)``."""
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


def kld_one_by_one(mean, variance):
    """Compute the KL divergence of each ordered pair with torch.distributions, ``(K, K)``; differentiable."""
    normals = [torch.distributions.Normal(m, v.sqrt()) for m, v in zip(mean, variance, strict=True)]
    rows = [[torch.distributions.kl_divergence(p, q).sum() for q in normals] for p in normals]
    return torch.stack([torch.stack(row) for row in rows])


def fpi_objective(mean, variance, data_mean, data_variance, kld_weight, alpha, pi):
    """Compute the objective of Eq. (3) and (4) of Enescu & Sahbi (BMVC 2024) term by term, with π constant."""
    kld = kld_one_by_one(mean, variance)
    pairs = [(y, other) for y in range(len(mean)) for other in range(len(mean)) if y != other]
    average = sum(float(kld[pair].detach()) for pair in pairs) / len(pairs)
    loss = 0.0
    for y in range(len(mean)):
        scatter = data_variance[y] + (data_mean[y] - mean[y]) ** 2
        loss = loss + 0.5 * (variance[y].log() + scatter / variance[y]).sum()
    for pair in pairs:
        scale = alpha * (float(kld[pair].detach()) if pi == "pair" else average)
        loss = loss + kld_weight * torch.exp(-kld[pair] / scale)
    return loss


def fpi_terms(mean, variance, data_mean, data_variance, kld_weight, alpha, pi):
    """Compute the means of Eq. (5), A and B of Eq. (7), and the variants A+ and B+ with positive terms only."""
    kld = kld_one_by_one(mean, variance)
    n = len(mean)
    average = float(kld.sum() - kld.diagonal().sum()) / (n * (n - 1))
    weight = torch.zeros_like(kld)
    for y in range(n):
        for other in range(n):
            scale = alpha * (kld[y, other] if pi == "pair" else average)
            weight[y, other] = 0.0 if y == other else kld_weight * torch.exp(-kld[y, other] / scale) / scale
    terms = {name: [] for name in ("mean", "A", "B", "A+", "B+")}
    for y in range(n):
        push, v = torch.zeros_like(mean[y]), variance[y]
        a, b = 1 / v, data_variance[y] + (data_mean[y] - mean[y]) ** 2
        a_plus, b_plus = a.clone(), b.clone()
        for other in range(n):
            forward, backward = weight[y, other], weight[other, y]
            delta, w = mean[y] - mean[other], variance[other]
            push = push + (forward / w + backward / v) * delta
            a = a + (forward - backward) / v + backward * (delta**2 + w) / v**2
            a_plus = a_plus + forward / v + backward * (delta**2 + w) / v**2
            b = b + v * forward / w * v
            b_plus = b_plus + v * forward / w * v + backward * v
        for name, term in zip(terms, (data_mean[y] + v * push, a, b, a_plus, b_plus), strict=True):
            terms[name].append(term)
    return {name: torch.stack(rows) for name, rows in terms.items()}


def fpi_sweep(mean, variance, data_mean, data_variance, kld_weight, alpha, pi, damp):
    """Return means and variances after one damped sweep of Eq. (5) and (6) in means and log-variances."""
    terms = fpi_terms(mean, variance, data_mean, data_variance, kld_weight, alpha, pi)
    target = (terms["B+"] / terms["A+"]).sqrt()
    return (1 - damp) * mean + damp * terms["mean"], variance ** (1 - damp) * target**damp


def frechet_distance(real, fake):
    """Compute ``|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`` with unbiased covariances.

    The trace of ``(S1 S2)^½`` is that of ``(√S1 S2 √S1)^½``, the square root of a symmetric matrix.
    """
    means, covariances = [], []
    for x in (real.double(), fake.double()):
        means.append(sum(x) / len(x))
        covariances.append(sum(torch.outer(row - means[-1], row - means[-1]) for row in x) / (len(x) - 1))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    return ((means[0] - means[1]) ** 2).sum() + covariances[0].trace() + covariances[1].trace() - 2 * shared


def density_and_coverage(real, fake, k):
    """Compute density and coverage (Naeem et al., 2020) one pair at a time, with strict inequality."""
    inside = 0
    covered = 0
    for i, point in enumerate(real.double()):
        others = sorted(float((point - other).square().sum()) for j, other in enumerate(real.double()) if j != i)
        within = sum(float((point - other).square().sum()) < others[k - 1] for other in fake.double())
        inside += within
        covered += within > 0
    return inside / (k * len(fake)), covered / len(real)


def interpolate_one(a, b, centre_a, centre_b, w, path):
    """Interpolate between two latents ``(D,)``, relative to a center on the line between both centers.

    The path is ``"linear"``, ``"rescaled"`` (preserves the variance) or spherical (Shoemake, 1985).
    """
    p, q = a.double() - centre_a.double(), b.double() - centre_b.double()
    centre = (1 - w) * centre_a.double() + w * centre_b.double()
    if path == "linear":
        return centre + (1 - w) * p + w * q
    if path == "rescaled":
        return centre + ((1 - w) * p + w * q) / ((1 - w) ** 2 + w**2) ** 0.5
    angle = torch.acos(p @ q / (p.norm() * q.norm()))
    return centre + (torch.sin((1 - w) * angle) * p + torch.sin(w * angle) * q) / torch.sin(angle)
