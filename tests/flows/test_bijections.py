"""Tests of all bijections: the inverse and the log-determinant are exact, and examples are independent."""

import math
from functools import partial

import pytest
import torch

from flowaug.flows import networks as conditioners
from flowaug.flows.bijections import (
    ActNorm,
    Chain,
    Coupling,
    FixedScale,
    InvertibleConv1x1,
    MultiScale,
    Patchify,
    Permute,
    PLUConv1x1,
    Reshape,
    Squeeze,
    TokenCoupling,
)
from flowaug.flows.bijections.coupling import LowRankExpTransform, MatrixExpTransform
from flowaug.flows.bijections.expm import expm, expm_action, series
from flowaug.flows.bijections.tokens import PATTERNS, halves_first, pattern_mask
from flowaug.flows.networks import ConvConditioner, PlainConditioner, TransformerConditioner
from tests.oracles import jacobian_ladj

CONV = partial(ConvConditioner, hidden=8, blocks=1)
ATTENTIVE = partial(ConvConditioner, hidden=8, blocks=1, attention=True)
GLOW = partial(PlainConditioner, hidden=8, kernels=(3, 1, 3))
MLP = partial(PlainConditioner, hidden=8, kernels=(1, 1, 1))
VIT = partial(TransformerConditioner, tokens=6, width=8, depth=2, heads=2)


def spatial(pattern):
    grid = (3, 2) if pattern == "columns" else (2, 3)
    return TokenCoupling(halves_first(pattern_mask(grid, pattern)), 1, VIT, (6, 4))


CASES = {
    "actnorm": (lambda: ActNorm((4, 2, 3)), (4, 2, 3)),
    "actnorm_per_channel": (lambda: ActNorm((4, 2, 3), per_channel=True), (4, 2, 3)),
    "fixed_scale": (lambda: FixedScale(0.5, -2.0), (2, 3)),
    "squeeze": (lambda: Squeeze(), (2, 4, 2)),
    "patchify": (lambda: Patchify((3, 2, 4), 2), (3, 2, 4)),
    "permute": (lambda: Permute(torch.randperm(5)), (5, 2)),
    "reshape": (lambda: Reshape((2, 3), (6,)), (2, 3)),
    "conv1x1": (lambda: InvertibleConv1x1(5), (5, 2, 2)),
    "plu": (lambda: PLUConv1x1(5), (5, 2, 3)),
    "additive": (lambda: Coupling(4, "additive", CONV), (4, 3, 2)),
    "affine": (lambda: Coupling(4, "affine", CONV), (4, 3, 2)),
    "matrix_exp": (lambda: Coupling(6, "matrix_exp", CONV), (6, 2, 2)),
    "odd_channels": (lambda: Coupling(5, "affine", CONV), (5, 2, 2)),
    "low_rank": (lambda: Coupling(50, "matrix_exp", CONV), (50, 1, 2)),
    "attention": (lambda: Coupling(4, "affine", ATTENTIVE), (4, 3, 2)),
    "glow_coupling": (lambda: Coupling(4, "affine", GLOW), (4, 3, 2)),
    "vector_coupling": (lambda: Coupling(7, "affine", MLP), (7, 1, 1)),
    "token_entries": (lambda: TokenCoupling(torch.randperm(4), 2, VIT, (6, 4)), (6, 4)),
    "token_checkerboard": (lambda: spatial("checkerboard"), (6, 4)),
    "token_columns": (lambda: spatial("columns"), (6, 4)),
    "token_rows": (lambda: spatial("rows"), (6, 4)),
    "chain": (lambda: Chain([Squeeze(), ActNorm((4, 2, 2)), InvertibleConv1x1(4)]), (1, 4, 4)),
    "multiscale": (
        lambda: MultiScale([Chain([Squeeze(), ActNorm((4, 2, 4))]), Chain([Squeeze()])], [(4, 2, 4), (8, 1, 2)]),
        (1, 4, 8),
    ),
}


def randomised(build, seed: int = 0):
    """Build a bijection with random parameters: the initial ones make a coupling the identity and the tests trivial."""
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
def test_ladj_equals_that_of_the_jacobian(name):
    build, shape = CASES[name]
    bijection, x = randomised(build), torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(bijection(x)[1], jacobian_ladj(bijection, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_examples_are_independent(name):
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
    if name != "multiscale":  # its initialise returns an empty tensor
        torch.testing.assert_close(result, expected)
    assert torch.isfinite(expected).all()


def test_actnorm_normalises_and_handles_constant_pixels():
    x = torch.randn(256, 1, 2, 2) * 3 + 5
    x[:, 0, 0, 0] = 0.25
    norm = ActNorm((1, 2, 2))
    z = norm.initialise(x)
    assert torch.isfinite(z).all()
    assert z[:, 0, 0, 0].abs().max() < 1e-5
    torch.testing.assert_close(z.var(0, correction=0)[0, 1], torch.ones(2), rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.inverse(norm(x)[0]), x)


def test_actnorm_stays_finite_for_extreme_parameters():
    norm = ActNorm((1, 2, 2))
    norm.log_scale.data = torch.tensor([[[1e6, -1e6], [0.0, 5.0]]])
    z, ladj = norm(torch.ones(2, 1, 2, 2))
    assert torch.isfinite(z).all()
    assert torch.isfinite(ladj).all()
    assert torch.isfinite(norm.inverse(z)).all()


def test_expm_equals_scipy():
    from scipy.linalg import expm as literal

    m = 2 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(expm(m), torch.from_numpy(literal(m.numpy())), rtol=1e-11, atol=1e-11)


def test_expm_action_at_the_largest_allowed_norm():
    s = torch.randn(64, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    s = 2.0 * s / s.abs().sum(-1).amax(-1)[:, None, None]
    x = torch.ones(64, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(expm_action(s, x), torch.matrix_exp(s) @ x, rtol=1e-13, atol=1e-13)
    single = expm_action(s.float(), x.float())
    torch.testing.assert_close(single.double(), torch.matrix_exp(s) @ x, rtol=2e-6, atol=2e-6)


def test_low_rank_transform_equals_the_exponential_of_the_product():
    torch.manual_seed(3)
    transform = LowRankExpTransform(30).double()
    raw = torch.randn(1, transform.num_raw, 1, 1, dtype=torch.float64)
    x = torch.randn(1, 30, 1, 1, dtype=torch.float64)
    u, v, t = transform._factors(raw)
    expected = torch.matrix_exp((u @ v)[0]) @ x[0, :, 0] + t[0, :, 0]
    torch.testing.assert_close(transform(x, raw)[0][0, :, 0], expected, rtol=1e-12, atol=1e-12)


def test_matrices_stay_bounded_for_extreme_conditioner_outputs():
    transform = MatrixExpTransform(6)
    transform.matrix.rescale.data.fill_(1e6)
    transform.matrix.reshift.data.fill_(-1e6)
    s, _ = transform._matrix_and_shift(torch.full((1, transform.num_raw, 1, 1), -1e9))
    assert s.abs().sum(-1).max() <= 2.0 + 1e-5


def test_conv1x1_is_initialised_with_a_rotation():
    conv = InvertibleConv1x1(8)
    x = torch.randn(4, 8, 2, 2)
    z, ladj = conv(x)
    torch.testing.assert_close(z.norm(), x.norm())
    torch.testing.assert_close(ladj, torch.zeros(4), atol=1e-5, rtol=0)
    assert math.isclose(torch.linalg.det(expm(conv.log_weight)).item(), 1, abs_tol=1e-6)


def test_plu_is_initialised_with_a_rotation_and_uses_only_the_triangles():
    conv = PLUConv1x1(8)
    x = torch.randn(4, 8, 2, 2)
    z, ladj = conv(x)
    torch.testing.assert_close(z.norm(), x.norm())
    torch.testing.assert_close(ladj, torch.zeros(4), atol=1e-5, rtol=0)
    conv.lower.data += torch.ones(8, 8)  # entries outside of the triangles are not used
    conv.upper.data += torch.ones(8, 8)
    torch.testing.assert_close(conv.inverse(conv(x)[0]), x, atol=1e-4, rtol=0)


def test_patterns_match_the_paper():
    masks = {p: pattern_mask((2, 4), p).view(2, 4).int().tolist() for p in PATTERNS}
    assert masks["checkerboard"] == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert masks["columns"] == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert masks["rows"] == [[1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_spatial_coupling_does_not_change_the_tokens_of_its_pattern(pattern):
    coupling, x = randomised(lambda: spatial(pattern)), torch.randn(2, 6, 4, dtype=torch.float64)
    kept = pattern_mask((3, 2) if pattern == "columns" else (2, 3), pattern)
    z = coupling(x)[0]
    assert torch.equal(z[:, kept], x[:, kept])
    assert (z[:, ~kept] != x[:, ~kept]).all()


def test_patchify_groups_the_pixels_of_a_patch():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    tokens = Patchify((1, 4, 4), 2)(x)[0]
    assert tokens[0].sort(1).values.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_saturated_scales_are_invertible():
    """Without a bound, s = −1e4 would make the inverse divide by 0."""
    coupling = randomised(lambda: TokenCoupling(torch.randperm(4), 2, VIT, (6, 4)))
    coupling.conditioner.head.bias.data.fill_(-1e4)
    coupling.conditioner.head.bias.data[:2] = 0
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    z, ladj = coupling(x)
    torch.testing.assert_close(coupling.inverse(z), x, atol=1e-10, rtol=0)
    floor = math.log(2 * torch.tensor(-4.0).sigmoid())
    torch.testing.assert_close(ladj, torch.full((2,), 12 * floor, dtype=torch.float64), rtol=1e-6, atol=0)


NETWORKS = {
    "conv": (CONV, (3, 4, 2)),
    "attention": (ATTENTIVE, (3, 4, 2)),
    "plain": (GLOW, (3, 4, 2)),
    "mlp": (MLP, (3, 1, 1)),
    "transformer": (VIT, (6, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_initialised_with_output_zero_and_nonzero_gradients(name):
    make, shape = NETWORKS[name]
    network, x = make(3, 5), torch.randn(2, *shape)
    out = network(x)
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_pixel_attention_is_initialised_as_the_identity_and_attends_to_every_pixel():
    attention, x = conditioners.PixelAttention(8).double(), torch.randn(1, 8, 3, 2, dtype=torch.float64)
    assert torch.equal(attention(x), x)
    attention.attention.out.weight.data.normal_()
    jacobian = torch.autograd.functional.jacobian(lambda v: attention(v)[0, :, 0, 0].sum(), x)
    assert (jacobian.abs().sum((0, 1)) > 1e-6).all()


def test_attention_equals_that_of_torch():
    ours = conditioners.SelfAttention(8, 2).double()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data.normal_()
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-12)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 10 cannot have 4 heads"):
        conditioners.SelfAttention(10, 4)


def test_backends_of_linear_agree(monkeypatch):
    x, weight, bias = torch.randn(3, 7, 5), torch.randn(4, 5), torch.randn(4)
    results = []
    for backend in ("blas", "onednn"):
        monkeypatch.setattr(conditioners, "LINEAR_BACKEND", backend)
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = conditioners.linear(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_gradient_of_the_matrix_exponential():
    matrix = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 5, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((f(matrix) * weight).sum(), matrix)[0] for f in (expm, torch.matrix_exp))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0, 1])
def test_gradient_of_the_series(offset):
    s, x = torch.randn(3, 4, 4, dtype=torch.float64) / 4, torch.randn(3, 4, 1, dtype=torch.float64)
    inputs = s.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, x: series(s, x, 12, offset), inputs)
