"""Tests of every registered architecture at its own depth.

Inverses and log-determinants are exact, examples are independent, and nothing synchronises the device.
"""

import numpy as np
import pytest
import torch

from flowaug import create_flow, list_flows
from flowaug.flows.architectures.vector import fair_permutations
from flowaug.flows.networks import ConvConditioner
from tests.oracles import jacobian_ladj

NARROW = {  # a smaller width makes the flows cheap to test, while they keep their depth
    "mef": ((1, 4, 8), {"hidden": 4, "num_levels": 2}),
    "glow": ((1, 4, 8), {"hidden": 4, "num_levels": 2}),
    "jet": ((1, 4, 8), {"width": 8, "heads": 2}),
    "vector": ((7,), {"hidden": 8}),
}


def events(flow, count, seed=0, device="cpu"):
    """Draw events (count, *event_shape) in [0, 1], in the dtype of the flow."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *flow.event_shape, generator=generator, dtype=flow.gaussians.mean.dtype).to(device)


def narrow_flow(name, noise=0.05, num_classes=3, **overrides):
    """Create a registered flow at its own depth, with random parameters in float64."""
    shape, width = NARROW[name.split("_")[0]]
    flow = create_flow(name, event_shape=shape, num_classes=num_classes, **(width | overrides)).double()
    generator = torch.Generator().manual_seed(1)
    for p in flow.parameters():
        p.data += noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return flow


@pytest.mark.parametrize("name", list_flows())
def test_registered_flows_are_exact(name):
    flow = narrow_flow(name)
    x = events(flow, 2)
    z, ladj = flow.encode(x)
    assert (z - narrow_flow(name, noise=0).encode(x)[0]).abs().mean() > 0.05  # the random parameters have an effect
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj[:1], jacobian_ladj(flow.encode, x[:1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["mef_tiny", "glow_tiny", "vector_tiny"])
@pytest.mark.parametrize("coupling", ["additive", "affine", "matrix_exp"])
def test_couplings_are_exact(name, coupling):
    flow = narrow_flow(name, noise=0.2, coupling=coupling)
    x = events(flow, 2)
    z, ladj = flow.encode(x)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj, jacobian_ladj(flow.encode, x), rtol=0, atol=1e-9)


def test_hidden_sets_the_width_of_each_level():
    flow = narrow_flow("mef_tiny", hidden=(4, 12))
    assert [m.hidden for m in flow.modules() if isinstance(m, ConvConditioner)] == [4] * 4 + [12] * 4
    x = events(flow, 2)
    torch.testing.assert_close(flow.decode(flow.encode(x)[0]), x, rtol=0, atol=1e-10)


def test_flow_without_split_is_exact_and_keeps_all_channels_in_all_levels():
    flow = narrow_flow("mef_tiny", noise=0.2, split=False)
    x = events(flow, 2)
    z, ladj = flow.encode(x)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj, jacobian_ladj(flow.encode, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.freeze().encode(x)[0], z, rtol=0, atol=1e-10)
    assert [len(level.bijections[2].matrix()) for level in flow.bijection.bijections[:2]] == [4, 16]


def test_flow_with_attention_is_exact():
    plain, flow = (narrow_flow("mef_tiny", noise=0, attention=a) for a in (False, True))
    extra = {k for k in flow.state_dict() if ".attention." in k}
    assert extra
    assert flow.state_dict().keys() - extra == plain.state_dict().keys()
    x = events(flow, 2)
    flow = narrow_flow("mef_tiny", noise=0.2, attention=True)
    z, ladj = flow.encode(x)
    without = narrow_flow("mef_tiny", noise=0.2, attention=True)
    for k, p in without.named_parameters():
        p.data *= ".attention.out." not in k
    assert (z - without.encode(x)[0]).abs().max() > 1e-3
    assert torch.isfinite(ladj).all()
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(ladj, jacobian_ladj(flow.encode, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list_flows())
def test_examples_are_independent(name):
    flow = narrow_flow(name)
    x = events(flow, 3)
    other = torch.cat([x[:1], 50 * x[1:]])
    for a, b in zip(flow.encode(x), flow.encode(other), strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list_flows())
def test_registered_flows_in_float32(name):
    """At their own sizes, with parameters close to their initial values."""
    shape = (24,) if name.startswith("vector") else (3, 16, 16)
    flow = create_flow(name, event_shape=shape, num_classes=1).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in flow.parameters():
        p += 0.01 * torch.randn(p.shape, generator=generator)
    x = events(flow, 2)
    assert (flow.decode(flow.encode(x)[0]) - x).abs().max() < 1e-4


@pytest.mark.parametrize("name", list_flows())
@pytest.mark.parametrize("noisy", [False, True])
def test_initialise_handles_constant_elements(name, noisy):
    flow = narrow_flow(name, noise=0).float()
    x = events(flow, 64)
    x[..., :2] = 0  # a constant border
    flow.initialise(flow.dequantise(x, torch.Generator().manual_seed(0)) if noisy else x)
    z, ladj = flow.encode(x)
    assert torch.isfinite(z).all()
    assert torch.isfinite(ladj).all()
    x[0, ..., :2] = 1  # which then changes
    z = flow.encode(x)[0]
    assert z.abs().max() < 2e3  # at most one standardisation of the noise, not one per ActNorm
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", list_flows())
def test_outlier_latents_decode_to_finite_values(name):
    """Nothing overflows. FlowMixupTransform rejects the decoded values because they are out of range."""
    flow = narrow_flow(name).float()
    z = 1e6 * torch.randn(4, flow.dim, generator=torch.Generator().manual_seed(2))
    x = flow.decode(z)
    assert torch.isfinite(x).all()
    assert (x.abs().flatten(1).amax(1) > 1e3).all()


@pytest.mark.parametrize("name", list_flows())
def test_inference_does_not_synchronise(name):
    """On the meta device there are no values, so ``.item()``, ``.cpu()`` or a branch on a tensor raises an error.

    A constant that is created on the CPU at every call raises one too.
    """
    flow = narrow_flow(name).float().to("meta")
    x = events(flow, 2, device="meta")
    with torch.no_grad():
        assert flow.decode(flow.encode(x)[0]).shape == x.shape


@pytest.mark.parametrize("name", list_flows("*_tiny"))
def test_training_does_not_synchronise(name):
    flow = narrow_flow(name).float().to("meta")
    flow.log_prob(events(flow, 2, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")).sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@pytest.mark.parametrize("dim", [2, 3, 5, 8])
def test_vector_couplings_transform_all_dimensions_equally_often(dim):
    layout, turns = torch.arange(dim), torch.zeros(dim)
    for order in fair_permutations(dim, 6):
        layout = layout[order]
        turns[layout[dim - dim // 2 :]] += 1
    assert sorted(layout.tolist()) == list(range(dim))
    assert turns.max() - turns.min() <= 1


def test_vector_density_integrates_to_one():
    flow = create_flow("vector_tiny", event_shape=(2,), num_classes=1, hidden=8).double()
    for p in flow.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    line = torch.linspace(-9, 9, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    mass = torch.cat([flow.log_prob(points).exp() for points in grid.split(50_000)]).sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_vector_samples_are_not_clamped():
    flow = narrow_flow("vector_tiny").float()
    x = flow.sample(torch.zeros(64, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    assert x.shape == (64, 7)
    assert x.min() < 0
    assert x.max() > 1


@pytest.mark.parametrize("name", list_flows())
def test_seed_determines_the_parameters_and_the_global_rng_is_unchanged(name):
    shape, width = NARROW[name.split("_")[0]]
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    first, again, other = (create_flow(name, event_shape=shape, num_classes=2, seed=s, **width) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before  # noqa: NPY002
    states = [f.state_dict() for f in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))


SIZES = [  # mef_base and glow_base have the sizes of the papers
    ("mef_base", (3, 32, 32), 42.8e6),
    ("mef_small", (3, 32, 32), 3.57e6),
    ("mef_tiny", (1, 28, 28), 205e3),
    ("glow_base", (3, 32, 32), 44.15e6),
    ("glow_tiny", (1, 28, 28), 77.2e3),
    ("jet_base", (3, 32, 32), 42.7e6),
    ("jet_tiny", (1, 28, 28), 631e3),
    ("vector_base", (10,), 4.28e6),
]


@pytest.mark.parametrize(("name", "shape", "size"), SIZES)
def test_number_of_parameters(name, shape, size):
    flow = create_flow(name, event_shape=shape, num_classes=10)
    assert sum(p.numel() for p in flow.parameters()) == pytest.approx(size, rel=0.005)


def test_permutations_are_saved_but_not_learned():
    for name, count in (("jet_tiny", 10), ("vector_tiny", 4), ("glow_tiny", 8)):
        flow = narrow_flow(name, noise=0)
        orders = {k for k in flow.state_dict() if k.endswith(".order")}
        assert len(orders) == count
        assert not orders & dict(flow.named_parameters()).keys()
