"""Registry of flow architectures: ``create_flow``, ``list_flows``, ``register_flow``."""

import difflib
import fnmatch
import math
from collections.abc import Callable

import torch

from flowaug.bijections import ActNorm, Bijection, Chain, Coupling, InvertibleConv1x1, MultiScale, Squeeze
from flowaug.flow import Flow
from flowaug.gaussians import ClassGaussians

_BUILDERS: dict[str, Callable[..., Bijection]] = {}
MAX_LEVELS = 3


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
    event_shape: tuple[int, int, int],
    num_classes: int,
    pretrained: bool | str = False,
    grey_levels: int = 256,
    seed: int = 0,
    **overrides,
) -> Flow:
    """Build a flow by name, with unit class Gaussians.

    Args:
        name: an architecture of ``list_flows()``.
        event_shape: (C, H, W) of the images.
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
    from flowaug.checkpoint import load_flow  # the one import against the order: a flow by name may be a trained one

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


def _check_arguments(name: str, event_shape: tuple[int, int, int], num_classes: int) -> None:
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown flow {name!r}; {hint}registered: {', '.join(list_flows())}")
    if len(event_shape) != 3 or any(not isinstance(n, int) or n < 1 for n in event_shape):
        raise ValueError(f"event_shape is {event_shape!r}; expected (channels, height, width), three positive integers")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")


def _build(name: str, event_shape: tuple[int, int, int], overrides: dict) -> Bijection:
    try:
        return _BUILDERS[name](event_shape, **overrides)
    except TypeError as error:
        raise ValueError(f"{name} does not take these overrides {sorted(overrides)}: {error}") from error


def default_num_levels(height: int, width: int) -> int:
    """As many 2×2 squeezes as the size allows while at least 2×2 pixels remain, three at most."""
    level = 0
    while level < MAX_LEVELS and height % 2 == width % 2 == 0 and min(height, width) >= 4:
        height, width, level = height // 2, width // 2, level + 1
    return level


def _check_size(event_shape: tuple[int, int, int], num_levels: int) -> None:
    _, height, width = event_shape
    step = 2**num_levels
    if num_levels < 1 or height % step or width % step:
        raise ValueError(
            f"a multi-scale flow halves the image once per level: {height}×{width} must be multiples of 2, at least 4, "
            f"and multiples of {max(step, 2)} for num_levels={num_levels}; resize the images or change num_levels"
        )


def build_mef(
    event_shape: tuple[int, int, int],
    *,
    steps: int,
    blocks: tuple[int, ...],
    hidden: int,
    coupling: str = "matrix_exp",
    num_levels: int | None = None,
) -> Bijection:
    """Matrix exponential flow (Xiao & Liu, ICML 2020): ActNorm, 1×1 convolution and coupling, level by level.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 ** num_levels``.
        steps: steps per level.
        blocks: residual blocks of the conditioners of each level; the last entry serves all further levels.
        hidden: width of the conditioners.
        coupling: "additive", "affine" or "matrix_exp".
        num_levels: number of levels, None for as many as the size allows (three at most).
    """
    channels, height, width = event_shape
    num_levels = default_num_levels(height, width) if num_levels is None else num_levels
    _check_size(event_shape, num_levels)
    levels, shapes = [], []
    for level in range(num_levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        shapes.append((channels, height, width))
        depth = blocks[min(level, len(blocks) - 1)]
        levels.append(_mef_level(shapes[-1], steps, coupling, hidden, depth))
        channels -= channels // 2
    return MultiScale(levels, shapes)


def _mef_level(shape: tuple[int, int, int], steps: int, coupling: str, hidden: int, blocks: int) -> Chain:
    chain: list[Bijection] = [Squeeze()]
    for _ in range(steps):
        chain += [ActNorm(shape), InvertibleConv1x1(shape[0]), Coupling(shape[0], coupling, hidden, blocks)]
    return Chain(chain)


@register_flow
def mef_tiny(event_shape: tuple[int, int, int], **overrides) -> Bijection:
    """MEF for small grey images: 4 steps per level, one block of width 32."""
    return build_mef(event_shape, **({"steps": 4, "blocks": (1,), "hidden": 32} | overrides))


@register_flow
def mef_small(event_shape: tuple[int, int, int], **overrides) -> Bijection:
    """MEF of about 2 M parameters at 32×32×3: 4 steps per level, two blocks of width 64."""
    return build_mef(event_shape, **({"steps": 4, "blocks": (2, 2, 1), "hidden": 64} | overrides))


@register_flow
def mef_base(event_shape: tuple[int, int, int], **overrides) -> Bijection:
    """The paper's MEF: 42.8 M parameters at 32×32×3."""
    return build_mef(event_shape, **({"steps": 8, "blocks": (8, 4, 2), "hidden": 128} | overrides))
