import math

import pytest
import torch

from flowaug import GaussianParameters, create_flow, list_flows, register_flow
from tests.flows.test_architectures import NARROW, events, narrow_flow

SMALL = {"steps": 2, "blocks": (1,), "hidden": 8}


def small_flow(name="mef_tiny", shape=(1, 4, 8), num_classes=3, seed=0, **overrides):
    """Create a flow with random parameters and random class Gaussians, in float64."""
    flow = create_flow(name, event_shape=shape, num_classes=num_classes, **(SMALL | overrides)).double()
    generator = torch.Generator().manual_seed(seed)
    for p in flow.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    mean = torch.randn(num_classes, flow.dim, generator=generator)
    flow.gaussians.assign_(GaussianParameters(mean, torch.rand(num_classes, flow.dim, generator=generator) + 0.5))
    return flow


def test_log_joint_and_log_prob_agree():
    flow, x = small_flow(), torch.rand(5, 1, 4, 8, dtype=torch.float64)
    joint = flow.log_joint(x)
    given = torch.stack([flow.log_prob(x, torch.full((5,), k)) for k in range(3)], 1)
    torch.testing.assert_close(joint, given - torch.log(torch.tensor(3.0, dtype=torch.float64)))
    torch.testing.assert_close(flow.log_prob(x), joint.logsumexp(1))


def test_hybrid_objective_is_likelihood_plus_tempered_posterior():
    flow, x, y = small_flow(), torch.rand(5, 1, 4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    posterior = (flow.log_joint(x) / (flow.gaussians.separation() / 10)).log_softmax(1)[range(5), y]
    torch.testing.assert_close(flow(x, y, 0.5), flow.log_prob(x, y) + 0.5 * flow.dim * posterior)
    assert torch.equal(flow(x, y), flow.log_prob(x, y))


def test_teacher_replaces_the_labels_in_the_posterior_only():
    flow, x, y = small_flow(), torch.rand(5, 1, 4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    others = (y + 1) % 3
    taught = flow(x, y, 0.5, torch.nn.functional.one_hot(others, 3).double())
    torch.testing.assert_close(taught - flow.log_prob(x, y), flow(x, others, 0.5) - flow.log_prob(x, others))


def test_hybrid_objective_before_the_class_gaussians_are_set():
    """All class Gaussians are equal, so the posterior is uniform and has no gradient."""
    flow = create_flow("mef_tiny", event_shape=(1, 4, 8), num_classes=3, **SMALL).double()
    x, y = torch.rand(5, 1, 4, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0])
    expected = flow.log_prob(x, y) - flow.dim * math.log(3)
    torch.testing.assert_close(flow(x, y, 1.0), expected)
    grads = [torch.autograd.grad(flow(x, y, w).sum(), list(flow.parameters())) for w in (0.0, 1.0)]
    torch.testing.assert_close(*grads)


def test_density_integrates_to_one():
    """Integrate over all 8 dimensions by importance sampling."""
    flow = create_flow("mef_tiny", event_shape=(1, 2, 4), num_classes=1, **SMALL, num_levels=1).double()
    for p in flow.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(100_000, 8, generator=generator, dtype=torch.float64) * 1.3
    proposal = torch.distributions.Normal(0, 1.3).log_prob(z).sum(1)
    mass = (flow.log_prob(z.view(-1, 1, 2, 4)) - proposal).exp()
    assert mass.mean().item() == pytest.approx(1, abs=5 * mass.std().item() / len(z) ** 0.5)
    assert mass.std().item() / len(z) ** 0.5 < 0.05


def test_float32_round_trip():
    flow = small_flow(shape=(3, 16, 16)).float()
    x = torch.rand(8, 3, 16, 16)
    assert (flow.decode(flow.encode(x)[0]) - x).abs().max() < 1e-4


def test_sample_is_deterministic_and_in_range():
    flow = small_flow().float()
    y = torch.tensor([0, 1, 2, 2])
    a, b = (flow.sample(y, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (4, 1, 4, 8)
    assert 0 <= a.min() <= a.max() <= 1


def test_registered_names_are_unique():
    def mef_tiny(event_shape):
        return None

    with pytest.raises(ValueError, match="'mef_tiny' is already registered"):
        register_flow(mef_tiny)


def test_list_flows_filters():
    assert list_flows("jet_*") == ["jet_base", "jet_small", "jet_tiny"]
    assert {name.split("_")[0] for name in list_flows()} >= NARROW.keys()


def test_initialise_normalises_latents():
    flow = create_flow("mef_tiny", event_shape=(1, 8, 8), num_classes=2)
    x = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 0  # a constant border
    flow.initialise(x)
    z, ladj = flow.encode(x)
    assert torch.isfinite(z).all()
    assert torch.isfinite(ladj).all()
    assert z[:, 30:].std().item() == pytest.approx(1, abs=0.3)


BAD_INPUT = [
    (
        lambda f: f.encode(torch.zeros(2, 1, 8, 4, dtype=torch.float64)),
        ValueError,
        r"takes images .* got \(2, 1, 8, 4\)",
    ),
    (lambda f: f.encode(torch.zeros(1, 4, 8, dtype=torch.float64)), ValueError, "takes images"),
    (lambda f: f.encode(torch.zeros(2, 1, 4, 8)), TypeError, "computes in torch.float64"),
    (lambda f: f.decode(torch.zeros(2, 31, dtype=torch.float64)), ValueError, "takes latents"),
    (lambda f: f.initialise(torch.full((2, 1, 4, 8), float("nan"), dtype=torch.float64)), ValueError, "NaN"),
    (lambda f: f.encode(torch.zeros(2, 1, 4, 8, dtype=torch.uint8)), TypeError, r"got a tensor of torch.uint8"),
    (lambda f: f.initialise(255 * events(f, 2)), ValueError, r"have values from .* divide 8-bit pixels by 255"),
    (lambda f: f.initialise(events(f, 2) * 4 - 2), ValueError, "undo any normalisation"),
    (lambda f: f.initialise(events(f, 1)), ValueError, "got 1 examples, pass 2 or more"),
    (lambda f: narrow_flow("vector_tiny").encode(events(f, 2)), ValueError, r"takes vectors .* shape \(B, 7\), got"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_INPUT)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(small_flow())


BAD_MODELS = [
    (dict(name="mef_tny"), "did you mean 'mef_tiny'"),
    (dict(event_shape=(1, 7, 8)), "multiples of 2"),
    (dict(event_shape=(1, 12, 12), num_levels=3), "num_levels=3"),
    (dict(event_shape=(8, 8)), "expected \\(channels, height, width\\)"),
    (dict(event_shape=(1, 0, 8)), "positive integers"),
    (dict(event_shape=64), "event_shape is 64; expected"),
    (dict(event_shape=(64,)), r"mef flows take images.*vector_\*"),
    (dict(hidden=()), r"number of widths \(hidden\) is 0; expected at least 1"),
    (dict(blocks=()), "number of blocks is 0; expected at least 1"),
    (dict(attention=True, hidden=10), "width 10 cannot have 4 heads"),
    (dict(name="glow_tiny", event_shape=(3, 9, 8)), "9×8 must be multiples of 2"),
    (dict(name="glow_tiny", event_shape=(3,)), "glow flows take images"),
    (dict(name="jet_tiny", event_shape=(3,)), "jet flows take images"),
    (dict(name="jet_tiny", event_shape=(1, 6, 8)), "6×8 must be multiples of 4"),
    (dict(name="jet_tiny", patch_size=3), "8×8 must be multiples of 6"),
    (dict(name="jet_tiny", patch_size=1), "1·1² must be even"),
    (dict(name="jet_tiny", patch_size=0), "change patch_size"),
    (dict(name="jet_tiny", width=10, heads=4), "must divide the width"),
    (dict(name="jet_tiny", heads=0), "0 heads"),
    (dict(name="jet_tiny", couplings=0), "couplings is 0; expected at least 1"),
    (dict(name="vector_tiny", event_shape=(4,), couplings=0), "couplings is 0; expected at least 1"),
    (dict(name="glow_tiny", steps=0), "steps is 0; expected at least 1"),
    (dict(name="vector_tiny"), r"event_shape is \(1, 8, 8\); expected \(D,\)"),
    (dict(name="vector_tiny", event_shape=(1,)), "at least 2 dimensions"),
    (dict(num_classes=0), "at least 1"),
    (dict(widht=3), "does not take these overrides"),
    (dict(coupling="spline"), "expected one of"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_MODELS)
def test_bad_model(arguments, message):
    arguments = {"name": "mef_tiny", "event_shape": (1, 8, 8), "num_classes": 2} | arguments
    with pytest.raises(ValueError, match=message):
        create_flow(arguments.pop("name"), **arguments)
