import pytest
import torch

from flowaug import create_flow
from flowaug.flows.networks import ScaledConv2d
from flowaug.training.optimizers import OPTIMIZERS, flow_optimizer
from flowaug.training.resume import load_state, save_state

SHAPES = {"mef_tiny": (1, 8, 8), "jet_tiny": (1, 8, 8), "vector_tiny": (6,)}


def flow_of(name="mef_tiny"):
    """A flow whose last layers are not 0 any more, so that every parameter has a gradient."""
    flow = create_flow(name, event_shape=SHAPES[name], num_classes=2, grey_levels=17, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return flow


def take_steps(flow, optimizer, seeds):
    for seed in seeds:
        x = torch.rand(8, *flow.event_shape, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        (-flow(x, torch.arange(8) % 2)).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_moves(name, opt):
    flow = flow_of(name)
    before = {key: p.detach().clone() for key, p in flow.named_parameters()}
    take_steps(flow, flow_optimizer(flow, opt, 0.01), [0, 1])
    assert [key for key, p in flow.named_parameters() if torch.equal(p, before[key])] == []
    assert all(p.isfinite().all() for p in flow.parameters())


def test_muon_moves_weights_of_conditioners_in_orthogonal_directions_only():
    flow = flow_of()
    layers = {name: m.weight.detach().clone() for name, m in flow.named_modules() if isinstance(m, ScaledConv2d)}
    logs = {name: p.detach().clone() for name, p in flow.named_parameters() if name.endswith("log_weight")}
    take_steps(flow, flow_optimizer(flow, "muon", 0.01), [0])
    for name, weight in layers.items():
        values = torch.linalg.svdvals((flow.get_submodule(name).weight.detach() - weight).flatten(1))
        assert values.max() < 3 * values.median(), name  # a gradient's own spread over magnitudes
    moved = flow.state_dict()
    for name, log in logs.items():  # Adam's first step is as long in every entry
        step = (moved[name] - log).abs()
        torch.testing.assert_close(step, step.max().expand_as(step), rtol=0.1, atol=0)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_saved_optimizer_goes_on_to_the_same_weights(tmp_path, opt):
    straight, cut = flow_of(), flow_of()
    take_steps(straight, flow_optimizer(straight, opt, 0.01), range(5))
    optimizer = flow_optimizer(cut, opt, 0.01)
    take_steps(cut, optimizer, range(3))
    save_state(tmp_path / "state", optimizer.state_dict())
    optimizer = flow_optimizer(cut, opt, 0.01)
    optimizer.load_state_dict(load_state(tmp_path / "state"))
    take_steps(cut, optimizer, [3, 4])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), cut.parameters(), strict=True))
