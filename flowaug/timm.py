"""Flow mixup in timm's training script, in front of its Mixup, CutMix and RandomErasing.

``examples/timm_train.patch`` adds these three lines to timm's ``train.py``::

    from flowaug.timm import wrap_loader
    group.add_argument('--flow-aug', nargs='*', default={}, action=utils.ParseKwargs)  # flow=runs/flow p=0.5
    loader_train, mixup_fn = wrap_loader(loader_train, mixup_fn, data_config=data_config, **args.flow_aug)
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.transform import FlowMixupTransform

_logger = logging.getLogger(__name__)

FlowSource = str | Path | FlowMixupTransform | tuple[Flow, ClasswisePCA]
BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NAFLEX = "NaFlex loaders yield dictionaries of patches, not images (B, C, H, W); leave out --naflex-loader"
AUGMIX = "AugMix splits hold several copies of each image and its loss compares them; leave out --aug-splits"
SOFT = (
    "flow mixup moves an image among those of its one class, so it needs integer labels (B,), before Mixup and without "
    "multi-label targets"
)


class BatchAugment:
    """Flow mixup (hard labels) → Mixup/CutMix → RandomErasing, on normalised batches where they are.

    Args:
        flow_mixup: the flow augmentation.
        mixup: timm's Mixup, or a callable like it, or None.
        erasing: timm's RandomErasing or None.
    """

    def __init__(
        self, flow_mixup: FlowMixupTransform, mixup: BatchTransform | None = None, erasing: RandomErasing | None = None
    ):
        self.flow_mixup, self.mixup, self.erasing = flow_mixup, mixup, erasing

    @property
    def mixup_enabled(self) -> bool:
        """Whether Mixup and CutMix mix; flow mixup and the soft labels stay as they are when it is switched off."""
        return getattr(self.mixup, "mixup_enabled", False)

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = value

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Augment normalised images (B, C, H, W) with integer labels (B,); labels come back soft (B, K) after Mixup.

        Raises:
            ValueError: soft or multi-label targets, or patches instead of images.
        """
        _check_batch(x, y)
        if x.device != self.flow_mixup.pca.axes.device:
            self.flow_mixup.to(x.device)
        x, y = self.flow_mixup(x, y)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        if self.erasing is not None:
            self.erasing.device = x.device
            x = self.erasing(x)
        return x, y


class FlowLoader:
    """A loader whose batches are augmented; everything but ``mixup_enabled`` is the wrapped loader's.

    Args:
        loader: what yields (images, labels).
        augment: the augmentation.
        in_loop: the training loop calls ``augment`` itself (as ``mixup_fn``): yield the batches as they come.
    """

    def __init__(self, loader, augment: BatchAugment, in_loop: bool = False):
        self._inner, self._in_loop = loader, in_loop
        self.augment, self.random_erasing = augment, augment.erasing

    @property
    def flow_mixup(self) -> FlowMixupTransform:
        """The flow augmentation, with its counts."""
        return self.augment.flow_mixup

    @property
    def mixup_enabled(self) -> bool:
        """Whether Mixup and CutMix mix; ``--mixup-off-epoch`` sets it, and from the next batch on it holds."""
        return self.augment.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self.augment.mixup_enabled = value

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self._inner:
            yield (x, y) if self._in_loop else self.augment(x, y)
        _logger.info("%r", self.flow_mixup)

    def __getattr__(self, name: str):
        if name == "_inner":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self._inner, name)


class HalfMixup(Mixup):
    """timm's mode "half", which it has as a collate function only: halves of the batch mix, one half remains."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) with labels (B,): B/2 images and soft labels (B/2, K)."""
        x, target = super().__call__(x, target)
        return x[: len(x) // 2], target[: len(target) // 2]


def wrap_loader(
    loader,
    mixup_fn: BatchTransform | None = None,
    flow: FlowSource | None = None,
    data_config: Mapping | None = None,
    **keywords,
) -> tuple:
    """Put flow mixup in front of Mixup, CutMix and RandomErasing in timm's training.

    With timm's prefetcher the loader that comes back yields augmented batches: its collate function no longer mixes
    (Mixup has moved to the device, after the flow, so that ``--mixup-off-epoch`` works with persistent workers too).
    With any other loader (``--no-prefetcher``) the loader yields normalised images as before and the ``mixup_fn`` that
    comes back does all three. Wrap a loader before its first pass.

    Args:
        loader: a training loader of timm's ``create_loader``, or any that yields normalised images (B, C, H, W) and
            integer labels (B,).
        mixup_fn: timm's Mixup, which the training loop would call; or None.
        flow: folder or name of a flow, a :class:`FlowMixupTransform`, or a flow and its axes; None changes nothing.
        data_config: of the classifier, as ``resolve_data_config`` returns it: ``mean, std, input_size``.
        **keywords: of :class:`FlowMixupTransform`, for example ``p``, ``alpha``, ``luminance``. ``class_names`` are
            the data set's own where it knows them; None leaves them unchecked.

    Returns:
        The loader to iterate over and the ``mixup_fn`` to hand to the training loop.

    Raises:
        ValueError: NaFlex, AugMix or multi-label training; a loader that has started; another normalisation or other
            classes than the flow's.
    """
    if flow is None:
        return loader, mixup_fn
    layers = list(_layers(loader))
    _check_loader(layers, mixup_fn)
    flow_mixup = _flow_mixup(flow, layers, data_config, keywords)
    mixup = _take_mixup(layers, mixup_fn)
    augment = BatchAugment(flow_mixup, mixup, _take_erasing(layers))
    if isinstance(loader, PrefetchLoader):
        return FlowLoader(loader, augment), None
    return FlowLoader(loader, augment, in_loop=True), augment


def _layers(loader) -> Iterator:
    """The loader, what it wraps, and its data sets, from the outside in."""
    while loader is not None:
        yield loader
        inner = getattr(loader, "loader", None)
        loader = getattr(loader, "dataset", None) if inner is None else inner


def _check_loader(layers: list, mixup_fn) -> None:
    if any(isinstance(part, FlowLoader) for part in layers):
        raise ValueError("the loader is wrapped already; call wrap_loader once, on the loader of create_loader")
    if any("NaFlex" in type(part).__name__ for part in layers):
        raise ValueError(f"flow mixup cannot be used here: {NAFLEX}")
    if any(isinstance(part, AugMixDataset) for part in layers):
        raise ValueError(f"flow mixup cannot be used here: {AUGMIX}")
    collate = _collate(layers)
    if any(getattr(mix, "multi_label", False) for mix in (mixup_fn, collate)):
        raise ValueError(f"Mixup is set to multi-label targets; {SOFT}")
    if isinstance(collate, FastCollateMixup) and mixup_fn is not None:
        raise ValueError("the loader mixes already (FastCollateMixup) and mixup_fn would mix again; pass mixup_fn=None")
    if any(getattr(part, name, None) is not None for part in layers for name in ("_iterator", "iterator")):
        raise ValueError("the loader's workers have started with Mixup inside; call wrap_loader before the first pass")


def _check_batch(x, y) -> None:
    if isinstance(x, Mapping):
        raise ValueError(f"flow mixup cannot be used here: {NAFLEX}")
    if isinstance(x, (list, tuple)):
        raise ValueError(f"flow mixup cannot be used here: {AUGMIX}")
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point():
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the loader's labels are {what}; {SOFT}")


def _collate(layers: list):
    return next((part.collate_fn for part in layers if hasattr(part, "collate_fn")), None)


def _take_mixup(layers: list, mixup_fn):
    """The Mixup to run on the device; the loader's workers stop mixing."""
    collate = _collate(layers)
    if not isinstance(collate, FastCollateMixup):
        return mixup_fn
    half = collate.mode == "half"
    mixup = HalfMixup() if half else Mixup()
    vars(mixup).update(vars(collate))
    mixup.mode = "elem" if half else collate.mode
    next(part for part in layers if "collate_fn" in vars(part)).collate_fn = fast_collate
    return mixup


def _take_erasing(layers: list) -> RandomErasing | None:
    """The loader's RandomErasing, or that at the end of its data set's transforms, which then lose it."""
    taken = None
    for part in layers:
        if getattr(part, "random_erasing", None) is not None:
            taken, part.random_erasing = copy.copy(part.random_erasing), None
        for steps in _transform_steps(part):
            if steps and isinstance(steps[-1], RandomErasing):
                taken = copy.copy(steps.pop())
                taken.num_splits = 0  # it meant nothing for single images
    return taken


def _transform_steps(part) -> Iterator[list]:
    several = getattr(part, "transforms", ())  # of timm's ScheduledTransformDataset
    for transform in (getattr(part, "transform", None), *(several if isinstance(several, tuple) else ())):
        steps = getattr(transform, "transforms", None)
        if isinstance(steps, list):
            yield steps


def _flow_mixup(flow: FlowSource, layers: list, data_config: Mapping | None, keywords: dict) -> FlowMixupTransform:
    mean, std = _normalisation(layers[0], data_config)
    if isinstance(flow, FlowMixupTransform):
        _check_transform(flow, mean, std, keywords)
        return flow
    keywords = {
        **{"mean": mean, "std": std, "class_names": _class_names(layers), "process_index": _process_index()},
        **keywords,
    }
    if isinstance(flow, tuple):
        return FlowMixupTransform(*flow, **keywords)
    return FlowMixupTransform.from_pretrained(flow, **keywords)


def _normalisation(loader, data_config: Mapping | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; averaged for other numbers of channels, as timm's loader does."""
    if data_config is None:
        raise ValueError("data_config is missing; pass what timm.data.resolve_data_config gave for the model")
    channels = data_config["input_size"][0]
    pair = (tuple(data_config[name]) for name in ("mean", "std"))
    mean, std = (v if len(v) == channels else (sum(v) / len(v),) * channels for v in pair)
    if isinstance(loader, PrefetchLoader):
        theirs = torch.stack([loader.mean, loader.std]).float().cpu().reshape(2, -1) / 255
        if not torch.allclose(theirs, torch.tensor([mean, std]), rtol=0.01):
            raise ValueError(
                f"the loader normalises with mean, std {theirs.tolist()} but data_config says {[mean, std]}; "
                "pass the data_config that the loader was made with"
            )
    return mean, std


def _check_transform(transform: FlowMixupTransform, mean, std, keywords: dict) -> None:
    if keywords:
        raise ValueError(f"{sorted(keywords)} cannot be changed on a FlowMixupTransform; pass them where you make it")
    ours = torch.stack([v.flatten().cpu().expand(len(mean)) for v in (transform.mean, transform.std)])
    if not torch.allclose(ours, torch.tensor([mean, std]), rtol=0.01):
        raise ValueError(
            f"the FlowMixupTransform expects mean, std {ours.tolist()} but the loader's images are normalised with "
            f"{[mean, std]}; make it with mean=data_config['mean'], std=data_config['std']"
        )


def _class_names(layers: list) -> tuple[str, ...] | None:
    """Class names of the innermost data set in label order, where it has them."""
    dataset = layers[-1]
    table = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        return None
    names = sorted(table, key=table.get)
    return tuple(names) if [table[n] for n in names] == list(range(len(names))) else None


def _process_index() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
