"""Frozen flows compute the same as trained ones, to float64 rounding; training options do not change the results."""

import pytest
import torch

from flowaug import list_flows, load_flow, save_flow
from flowaug.data import load_dataset, stack_images
from flowaug.flows import activations
from flowaug.flows.bijections import expm
from flowaug.flows.bijections.base import Chunked
from flowaug.flows.bijections.expm import expm_of_pixels
from flowaug.flows.inference import _fused_multiply_add
from tests.flows.test_architectures import events, narrow_flow


@pytest.mark.parametrize("name", list_flows())
def test_frozen_flows_compute_the_same(name):
    flow = narrow_flow(name)
    frozen, x = flow.freeze(), events(flow, 3)
    with torch.no_grad():
        z, ladj = flow.encode(x)
        torch.testing.assert_close(frozen.encode(x), (z, ladj), rtol=0, atol=1e-10)
        torch.testing.assert_close(frozen.decode(z), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mef_tiny", "jet_tiny", "glow_tiny", "vector_tiny"])
def test_freeze_does_not_change_the_flow(name):
    flow = narrow_flow(name)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    frozen, x = flow.freeze(), events(flow, 2)
    flow.log_prob(x).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert frozen.freeze() is frozen


@pytest.mark.parametrize("coupling", ["additive", "affine", "matrix_exp"])
@pytest.mark.parametrize("name", ["mef_tiny", "glow_tiny"])
def test_frozen_couplings_compute_the_same(name, coupling):
    flow = narrow_flow(name, noise=0.2, coupling=coupling)
    frozen, x = flow.freeze(), events(flow, 2)
    with torch.no_grad():
        torch.testing.assert_close(frozen.encode(x), flow.encode(x), rtol=0, atol=1e-9)


def test_frozen_series_has_as_few_terms_as_the_parameters_allow():
    flow = narrow_flow("mef_tiny", noise=0)
    norms = [m.norm for m in flow.freeze().modules() if hasattr(m, "norm") and isinstance(m.norm, float)]
    assert norms
    assert max(norms) == pytest.approx(1)  # the initial norm is half of the bound, which is 2


def test_frozen_flow_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="save the flow it was frozen from"):
        save_flow(narrow_flow("mef_tiny").freeze(), tmp_path)


@pytest.mark.parametrize("name", ["mef_tiny", "jet_tiny", "glow_tiny", "vector_tiny"])
def test_bfloat16_conditioner_keeps_events_and_log_determinants_in_float32(name):
    flow = narrow_flow(name).float()
    frozen, x = flow.freeze(torch.bfloat16), events(flow, 3)
    with torch.no_grad():
        z, ladj = frozen.encode(x)
        exact = flow.encode(x)
        assert z.dtype == ladj.dtype == torch.float32
        assert 0 < (z - exact[0]).abs().max() < 0.1
        assert (frozen.decode(z) - x).abs().max() < 0.05


def test_bfloat16_round_trip_of_a_trained_flow():
    """The documented bound on the bundled flow is 0.01 of the range of a pixel in bfloat16, 1e-4 in float32."""
    flow = load_flow("digits")
    digits_images = stack_images(load_dataset("digits", split="val"), (8, 8), 1).float() / 255
    with torch.no_grad():
        for frozen, bound in ((flow.freeze(), 1e-4), (flow.freeze(torch.bfloat16), 1e-2)):
            z, _ = frozen.encode(digits_images)
            assert (frozen.decode(z) - digits_images).abs().max() < bound


@pytest.mark.parametrize("name", ["mef_tiny", "jet_tiny", "glow_tiny", "vector_tiny"])
def test_grad_checkpointing_does_not_change_gradients(name):
    gradients = []
    for grad_checkpointing in (False, True):
        flow = narrow_flow(name).float().set_training_form(grad_checkpointing=grad_checkpointing)
        flow.log_prob(events(flow, 3)).sum().backward()
        gradients.append([p.grad for p in flow.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_bfloat16_training_computes_float32_gradients():
    flow = narrow_flow("mef_tiny").float().set_training_form(torch.bfloat16)
    exact = narrow_flow("mef_tiny").float()
    for f in (flow, exact):
        f.log_prob(events(f, 3)).sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in f.bijection.parameters()]) for f in (flow, exact))
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()


def test_chunks_do_not_change_the_results(monkeypatch):
    flow = narrow_flow("mef_tiny")
    x = events(flow, 5)
    whole = flow.encode(x)
    monkeypatch.setattr("flowaug.flows.bijections.coupling.CACHE", 1)
    for chunked in (narrow_flow("mef_tiny"), narrow_flow("mef_tiny").freeze()):
        torch.testing.assert_close(chunked.encode(x), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(chunked.decode(whole[0]), x, rtol=0, atol=1e-10)
        assert {len(chunk) for m in chunked.modules() if isinstance(m, Chunked) for chunk in m.chunks(x)} == {1}


@torch.no_grad()
def test_frozen_steps_use_the_chunks_of_their_coupling_and_compiled_chunks_are_larger():
    x = torch.zeros(600, 4, 32, 32)
    plain, compiled = (narrow_flow("mef_tiny", hidden=32).freeze(compiled=c) for c in (False, True))
    first = [f.bijection.levels[0].bijections[1] for f in (plain, compiled)]
    assert [len(step.chunks(x)[0]) for step in first] == [16, 32]


def test_compiled_flow_computes_the_same(monkeypatch):
    """The eager backend tests tracing, padding and shapes; benchmarks/throughput.py runs the real compiler."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager", fullgraph=True, **options))
    flow = narrow_flow("mef_tiny")
    frozen = flow.freeze(compiled=True)
    with torch.no_grad():
        for count in (3, 4, 1):
            x = events(flow, count)
            torch.testing.assert_close(frozen.encode(x), flow.encode(x), rtol=0, atol=1e-10)
            torch.testing.assert_close(frozen.decode(flow.encode(x)[0]), x, rtol=0, atol=1e-10)


def test_multiply_add_is_fused_unless_the_user_changed_the_option(monkeypatch):
    from torch._inductor import config

    name = "enable_floating_point_contract_flag"
    for chosen, expected in (("off", {f"cpp.{name}": "fast"}), ("on", {})):
        monkeypatch.setattr(config.cpp, name, chosen, raising=False)
        assert _fused_multiply_add() == expected
    monkeypatch.delattr(config.cpp, name)
    assert _fused_multiply_add() == {}


def test_compiled_formulas_equal_the_eager_ones(monkeypatch):
    x = torch.cat([torch.linspace(-40, 40, 999, dtype=torch.float64), torch.tensor([0.0, -0.0, 1e3, -1e3])])
    x = torch.cat([x, torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=torch.float64)])
    torch.manual_seed(9)
    s, v = torch.randn(2, 9, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    s = s / s.abs().sum(1, keepdim=True)
    plain = activations.elu(x), activations.tanh(x), expm_of_pixels(s, v, 2.0)
    used = []
    for module in (activations, expm):
        monkeypatch.setattr(module, "in_compiled_inference", lambda: used.append(1) or True)
    with torch.no_grad():
        fused = activations.elu(x), activations.tanh(x), expm_of_pixels(s, v, 2.0)
    assert len(used) == 3
    torch.testing.assert_close(fused, plain, rtol=1e-13, atol=1e-15, equal_nan=True)
    literal = torch.matrix_exp(s.view(2, 3, 3, 4, 5).permute(0, 3, 4, 1, 2).contiguous())
    literal = literal @ v.permute(0, 2, 3, 1)[..., None]
    torch.testing.assert_close(fused[2], literal[..., 0].permute(0, 3, 1, 2), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_compiled_elu_of_every_bfloat16_number(monkeypatch):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    exact = torch.nn.functional.elu(x.double())
    eager = activations.elu(x).double()
    monkeypatch.setattr(activations, "in_compiled_inference", lambda: True)
    fused = activations.elu(x)
    assert fused.dtype == torch.bfloat16
    assert not torch.equal(fused.double().nan_to_num(), eager.nan_to_num())  # otherwise the formula was not used
    formula = (x.double() ** 4 / 12288).clamp(max=6e-4) + 1e-6  # 1e-6 is float32 rounding near 1
    bound = formula + 2**-8 * exact.abs()  # plus half of the gap between two bfloat16 numbers
    outside = (fused.double() - exact).abs() > bound.where(exact < 0, 0 * exact)
    assert not outside.any(), x[outside]
    assert torch.equal(fused.isnan(), exact.isnan())
