"""The contract of a bijection, one table for all: exact inverse, exact log-determinant, independent examples."""

import math

import pytest
import torch

from flowaug.bijections import ActNorm, Chain, Coupling, InvertibleConv1x1, MultiScale, Squeeze
from flowaug.bijections.coupling import LowRankExpTransform, MatrixExpTransform, expm_action
from flowaug.bijections.linear import expm
from flowaug.bijections.pointwise import inverse_softplus
from tests.oracles import jacobian_ladj

CASES = {
    "actnorm": (lambda: ActNorm((4, 2, 3)), (4, 2, 3)),
    "squeeze": (lambda: Squeeze(), (2, 4, 2)),
    "conv1x1": (lambda: InvertibleConv1x1(5), (5, 2, 2)),
    "additive": (lambda: Coupling(4, "additive", hidden=8, blocks=1), (4, 3, 2)),
    "affine": (lambda: Coupling(4, "affine", hidden=8, blocks=1), (4, 3, 2)),
    "matrix_exp": (lambda: Coupling(6, "matrix_exp", hidden=8, blocks=2), (6, 2, 2)),
    "odd_channels": (lambda: Coupling(5, "affine", hidden=8, blocks=1), (5, 2, 2)),
    "low_rank": (lambda: Coupling(50, "matrix_exp", hidden=8, blocks=1), (50, 1, 2)),
    "chain": (lambda: Chain([Squeeze(), ActNorm((4, 2, 2)), InvertibleConv1x1(4)]), (1, 4, 4)),
    "multiscale": (
        lambda: MultiScale([Chain([Squeeze(), ActNorm((4, 2, 4))]), Chain([Squeeze()])], [(4, 2, 4), (8, 1, 2)]),
        (1, 4, 8),
    ),
}


def randomised(build, seed: int = 0):
    """A fresh coupling is the identity, for which these tests would be empty."""
    torch.manual_seed(seed)
    bijection = build().double()
    for parameter in bijection.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return bijection


@pytest.mark.parametrize("name", CASES)
def test_inverse_undoes_forward(name):
    build, shape = CASES[name]
    bijection, x = randomised(build), torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(bijection.inverse(bijection(x)[0]), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_forward_undoes_inverse(name):
    build, shape = CASES[name]
    bijection, x = randomised(build), torch.randn(3, *shape, dtype=torch.float64)
    z = torch.randn_like(bijection(x)[0])
    torch.testing.assert_close(bijection(bijection.inverse(z))[0], z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_ladj_is_that_of_the_jacobian(name):
    build, shape = CASES[name]
    bijection, x = randomised(build), torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(bijection(x)[1], jacobian_ladj(bijection, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_examples_do_not_influence_each_other(name):
    build, shape = CASES[name]
    bijection, x = randomised(build), torch.randn(3, *shape, dtype=torch.float64)
    other = x.clone()
    other[1:] *= 50
    torch.testing.assert_close(bijection(x)[0][0], bijection(other)[0][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_initialise_returns_forward(name):
    build, shape = CASES[name]
    bijection, x = randomised(build), torch.randn(16, *shape, dtype=torch.float64)
    result = bijection.initialise(x)
    expected = bijection(x)[0]
    if name != "multiscale":  # which returns what its last level keeps
        torch.testing.assert_close(result, expected)
    assert torch.isfinite(expected).all()


def test_actnorm_normalises_and_survives_constant_pixels():
    x = torch.randn(256, 1, 2, 2) * 3 + 5
    x[:, 0, 0, 0] = 0.25
    norm = ActNorm((1, 2, 2))
    z = norm.initialise(x)
    assert torch.isfinite(z).all()
    assert z[:, 0, 0, 0].abs().max() < 1e-5
    torch.testing.assert_close(z.var(0, correction=0)[0, 1], torch.ones(2), rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.inverse(norm(x)[0]), x)


@pytest.mark.parametrize("value", [1e-4, 0.1, 1.0, 100.0, 1e4])
def test_inverse_softplus_is_safe(value):
    y = torch.tensor(value)
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(y)), y)


def test_expm_is_scipys():
    from scipy.linalg import expm as literal

    m = 2 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(expm(m), torch.from_numpy(literal(m.numpy())), rtol=1e-11, atol=1e-11)


def test_expm_action_at_the_largest_norm_allowed():
    s = torch.randn(64, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    s = 2.0 * s / s.abs().sum(-1).amax(-1)[:, None, None]
    x = torch.ones(64, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(expm_action(s, x), torch.matrix_exp(s) @ x, rtol=1e-13, atol=1e-13)
    single = expm_action(s.float(), x.float())
    torch.testing.assert_close(single.double(), torch.matrix_exp(s) @ x, rtol=2e-6, atol=2e-6)


def test_low_rank_form_is_the_exponential_of_the_product():
    torch.manual_seed(3)
    transform = LowRankExpTransform(30).double()
    raw = torch.randn(1, transform.num_raw, 1, 1, dtype=torch.float64)
    x = torch.randn(1, 30, 1, 1, dtype=torch.float64)
    u, v, t = transform._factors(raw)
    expected = torch.matrix_exp((u @ v)[0]) @ x[0, :, 0] + t[0, :, 0]
    torch.testing.assert_close(transform(x, raw)[0][0, :, 0], expected, rtol=1e-12, atol=1e-12)


def test_matrices_stay_bounded_whatever_the_conditioner_says():
    transform = MatrixExpTransform(6)
    transform.matrix.rescale.data.fill_(1e6)
    transform.matrix.reshift.data.fill_(-1e6)
    s, _ = transform._matrix_and_shift(torch.full((1, transform.num_raw, 1, 1), -1e9))
    assert s.abs().sum(-1).max() <= 2.0 + 1e-5


def test_rotation_start_keeps_volume_and_length():
    conv = InvertibleConv1x1(8)
    x = torch.randn(4, 8, 2, 2)
    z, ladj = conv(x)
    torch.testing.assert_close(z.norm(), x.norm())
    torch.testing.assert_close(ladj, torch.zeros(4), atol=1e-5, rtol=0)
    assert math.isclose(torch.linalg.det(expm(conv.log_weight)).item(), 1, abs_tol=1e-6)
