"""Registry of flow architectures: ``create_flow``, ``list_flows``, ``register_flow``."""

import difflib
import fnmatch
import math
from collections.abc import Callable, Sequence

import torch

from flowaug.flows import architectures
from flowaug.flows.bijections import Bijection
from flowaug.flows.flow import Flow
from flowaug.latents.gaussians import ClassGaussians

_BUILDERS: dict[str, Callable[..., Bijection]] = {}


def register_flow(builder: Callable[..., Bijection]) -> Callable[..., Bijection]:
    """Register ``builder(event_shape, **overrides) -> Bijection`` under its function name."""
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"a flow named {name!r} is already registered; choose another name")
    _BUILDERS[name] = builder
    return builder


def list_flows(pattern: str = "*") -> list[str]:
    """Names of the registered architectures that match a shell pattern such as ``"mef*"``."""
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create_flow(
    name: str,
    *,
    event_shape: tuple[int, ...],
    num_classes: int,
    pretrained: bool | str = False,
    grey_levels: int = 256,
    seed: int = 0,
    **overrides,
) -> Flow:
    """Build a flow by name, with unit class Gaussians.

    Args:
        name: an architecture of ``list_flows()``.
        event_shape: (C, H, W) of the images, or (D,) of the vectors.
        num_classes: number of classes ``K``.
        pretrained: a trained flow's folder or bundled name whose weights to load; it must be of this architecture.
        grey_levels: number of grey levels of the images (256 for 8 bit).
        seed: seed of the initial parameters; the global RNG is left as it was.
        **overrides: hyper-parameters of the architecture, for example ``hidden=96``.

    Raises:
        ValueError: for an unknown name, override or event shape.
    """
    _check_arguments(name, event_shape, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bijection = _build(name, tuple(event_shape), overrides)
    config = {"architecture": name, "event_shape": list(event_shape), "num_classes": num_classes}
    config |= {"grey_levels": grey_levels, "overrides": overrides}
    flow = Flow(bijection, _unit_gaussians(num_classes, math.prod(event_shape)), event_shape, grey_levels, config)
    return _with_pretrained(flow, pretrained) if pretrained else flow


def _with_pretrained(flow: Flow, source: bool | str) -> Flow:
    from flowaug.flows.checkpoint import (
        load_flow,  # the one import against the order: a flow by name may be a trained one
    )

    if source is True:
        raise ValueError("pretrained=True names no flow; pass a folder or a bundled name such as pretrained='digits'")
    trained = load_flow(source)
    ours, theirs = ({k: f.config[k] for k in flow.config} for f in (flow, trained))
    if ours != theirs:
        raise ValueError(
            f"the flow at {source!r} is {theirs}, but {ours} was asked for; leave the differing arguments out"
        )
    return trained


def _unit_gaussians(num_classes: int, dim: int) -> ClassGaussians:
    return ClassGaussians(torch.zeros(num_classes, dim), torch.ones(num_classes, dim))


def _check_arguments(name: str, event_shape: tuple[int, ...], num_classes: int) -> None:
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown flow {name!r}; {hint}registered: {', '.join(list_flows())}")
    if (
        not isinstance(event_shape, Sequence)
        or len(event_shape) not in (1, 3)
        or any(not isinstance(n, int) or n < 1 for n in event_shape)
    ):
        raise ValueError(
            f"event_shape is {event_shape!r}; expected (channels, height, width) for images or (D,) for vectors, "
            "positive integers"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")


def _build(name: str, event_shape: tuple[int, ...], overrides: dict) -> Bijection:
    try:
        return _BUILDERS[name](event_shape, **overrides)
    except TypeError as error:
        raise ValueError(f"{name} does not take these overrides {sorted(overrides)}: {error}") from error


for _name in architectures.__all__:
    register_flow(getattr(architectures, _name))
