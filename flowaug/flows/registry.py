"""Registry of flow architectures."""

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
    """Register a flow architecture under the name of its builder. Can be used as a decorator.

    Args:
        builder: function ``builder(event_shape, **overrides)`` that returns a bijection from events to latents (B, D).

    Returns:
        ``builder``.

    Raises:
        ValueError: if the name is already registered.

    Example:
        >>> from flowaug.flows.bijections import Reshape
        >>> @register_flow
        ... def identity(event_shape):
        ...     return Reshape(event_shape, (math.prod(event_shape),))
        >>> create_flow("identity", event_shape=(1, 2, 2), num_classes=3).dim
        4
        >>> del _BUILDERS["identity"]  # undo the registration
    """
    name = builder.__name__
    if name in _BUILDERS:
        raise ValueError(f"a flow named {name!r} is already registered; rename the function")
    _BUILDERS[name] = builder
    return builder


def list_flows(pattern: str = "*") -> list[str]:
    """Return the names of the registered architectures that match a shell pattern.

    Example:
        >>> list_flows("mef*")
        ['mef_base', 'mef_small', 'mef_tiny']
    """
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create_flow(
    name: str,
    *,
    event_shape: tuple[int, ...],
    num_classes: int,
    grey_levels: int = 256,
    seed: int = 0,
    **overrides,
) -> Flow:
    """Create an untrained flow by name. Its class Gaussians have mean 0 and variance 1.

    Use ``load_flow`` to load a trained flow.

    Args:
        name: name of an architecture, see ``list_flows``.
        event_shape: (C, H, W) for images or (D,) for vectors.
        num_classes: number of classes K.
        grey_levels: number of grey levels of the images (256 for 8 bit).
        seed: seed of the initial parameters. The state of the global RNG is not changed.
        **overrides: hyperparameters of the architecture, for example ``hidden=96``.

    Returns:
        The flow, in training mode.

    Raises:
        ValueError: for an unknown name, or an invalid event shape, number of classes or override.

    Example:
        >>> flow = create_flow("mef_tiny", event_shape=(1, 8, 8), num_classes=10, hidden=16)
        >>> latents, ladj = flow.encode(torch.rand(4, 1, 8, 8))
        >>> latents.shape
        torch.Size([4, 64])
    """
    _check_arguments(name, event_shape, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bijection = _build(name, tuple(event_shape), overrides)

    gaussians = _unit_gaussians(num_classes, math.prod(event_shape))
    config = {
        "architecture": name,
        "event_shape": list(event_shape),
        "num_classes": num_classes,
        "grey_levels": grey_levels,
        "overrides": overrides,
    }
    return Flow(bijection, gaussians, event_shape, grey_levels, config)


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
            "with positive integers"
        )

    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")


def _build(name: str, event_shape: tuple[int, ...], overrides: dict) -> Bijection:
    try:
        return _BUILDERS[name](event_shape, **overrides)
    except TypeError as error:
        raise ValueError(f"{name} does not take these overrides: {sorted(overrides)} ({error})") from error


for _name in architectures.__all__:
    register_flow(getattr(architectures, _name))
