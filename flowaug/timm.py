"""Flow mixup in timm's training script, before Mixup, CutMix and RandomErasing.

``examples/timm_train.patch`` adds three lines to timm's ``train.py``::

    from flowaug.timm import FlowAugAction, wrap_loader
    group.add_argument('--flow-aug', nargs='*', default={}, action=FlowAugAction)  # flow=runs/flow p=0.5
    loader_train, mixup_fn = wrap_loader(loader_train, mixup_fn, data_config=data_config, **args.flow_aug)
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch import Tensor, distributed

from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.settings import FlowAugAction as FlowAugAction
from flowaug.mixup.timm_mixup import HalfMixup
from flowaug.mixup.transform import FlowMixupTransform

_logger = logging.getLogger(__name__)

FlowSource = str | Path | FlowMixupTransform | tuple[Flow, ClasswisePCA]
BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NAFLEX = "NaFlex loaders yield dictionaries of patches, not images (B, C, H, W); leave out --naflex-loader"
AUGMIX = "AugMix splits hold several copies of each image and its loss compares them; leave out --aug-splits"
AS_TEXT = (
    "a folder or name as text, a FlowMixupTransform, or (flow, pca); read the option with "
    "action=flowaug.timm.FlowAugAction"
)
SOFT = (
    "flow mixup mixes images of the same class and needs integer labels (B,); apply it before Mixup and without "
    "multi-label targets"
)


class BatchAugment:
    """Augmentation of normalised batches on their device: flow mixup (hard labels), then Mixup/CutMix, RandomErasing.

    Args:
        flow_mixup: flow mixup.
        mixup: timm's Mixup, a similar callable, or None.
        erasing: timm's RandomErasing or None.
    """

    def __init__(
        self, flow_mixup: FlowMixupTransform, mixup: BatchTransform | None = None, erasing: RandomErasing | None = None
    ):
        self.flow_mixup, self.mixup, self.erasing = flow_mixup, mixup, erasing

    @property
    def mixup_enabled(self) -> bool:
        """Whether Mixup and CutMix are enabled; switching them off affects neither flow mixup nor the soft labels."""
        return getattr(self.mixup, "mixup_enabled", False)

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        if self.mixup is not None:
            self.mixup.mixup_enabled = value

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Augment normalised images (B, C, H, W) with integer labels (B,); after Mixup the labels are soft (B, K).

        Raises:
            ValueError: if the targets are soft or multi-label, or the batch has patches instead of images.
        """
        _check_batch(x, y)
        if x.device != self.flow_mixup.pca.axes.device:
            self.flow_mixup.to(x.device)

        x, y = self.flow_mixup(x, y)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        if self.erasing is not None:
            cast(Any, self.erasing).device = x.device
            x = self.erasing(x)
        return x, y


class FlowLoader:
    """Loader of augmented batches. All attributes but ``mixup_enabled`` are those of the wrapped loader.

    Args:
        loader: loader of (images, labels).
        augment: the augmentation.
        in_loop: yield the batches unchanged, because the training loop calls ``augment`` itself, as ``mixup_fn``.
    """

    def __init__(self, loader, augment: BatchAugment, in_loop: bool = False):
        self._inner, self._in_loop = loader, in_loop
        self.augment, self.random_erasing = augment, augment.erasing

    @property
    def flow_mixup(self) -> FlowMixupTransform:
        """Flow mixup, with its counts."""
        return self.augment.flow_mixup

    @property
    def mixup_enabled(self) -> bool:
        """Whether Mixup and CutMix are enabled, from the next batch on; set by ``--mixup-off-epoch``."""
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
        if name == "_inner":  # not set yet during unpickling
            raise AttributeError(name)
        return getattr(self._inner, name)


def wrap_loader(
    loader,
    mixup_fn: BatchTransform | None = None,
    flow: FlowSource | None = None,
    data_config: Mapping | None = None,
    **keywords,
) -> tuple:
    """Add flow mixup before Mixup, CutMix and RandomErasing in timm's training script.

    With timm's prefetcher the returned loader yields augmented batches. Mixup moves from the collate function to the
    device, after flow mixup, so ``--mixup-off-epoch`` also works with persistent workers. With other loaders
    (``--no-prefetcher``) the returned loader yields normalised images as before, and the returned ``mixup_fn`` applies
    all three augmentations. Wrap a loader before its first iteration.

    Args:
        loader: training loader from timm's ``create_loader``, or another loader of normalised images (B, C, H, W) and
            integer labels (B,).
        mixup_fn: timm's Mixup as called by the training loop, or None.
        flow: folder or name of a flow, a :class:`FlowMixupTransform`, or a pair of flow and principal components; None
            returns the arguments unchanged.
        data_config: the classifier's data configuration, from ``resolve_data_config``: ``mean, std, input_size``.
        **keywords: arguments of :class:`FlowMixupTransform`, for example ``p``, ``alpha``, ``luminance``.
            ``class_names`` defaults to the names in the data set, if it has any; None skips the check.

    Returns:
        The loader to iterate over and the ``mixup_fn`` for the training loop.

    Raises:
        ValueError: if training uses NaFlex, AugMix or multi-label targets, the loader has started, or its normalisation
            or classes differ from the flow's.
    """
    if flow is None and not keywords:
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
    """Iterate over the loader, the loaders that it wraps and their data sets, from the outermost to the innermost."""
    while loader is not None:
        yield loader
        inner = getattr(loader, "loader", None)
        loader = getattr(loader, "dataset", None) if inner is None else inner


def _check_loader(layers: list, mixup_fn) -> None:
    if any(isinstance(part, FlowLoader) for part in layers):
        raise ValueError("the loader is wrapped already; call wrap_loader once, on the loader from create_loader")
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
        raise ValueError("the workers of the loader have already started; call wrap_loader before the first iteration")


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
    """Return the Mixup to run on the device, and remove it from the loader's workers."""
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
    """Remove RandomErasing from the loader, or from the end of its data set's transforms, and return it."""
    taken = None
    for part in layers:
        if getattr(part, "random_erasing", None) is not None:
            taken, part.random_erasing = copy.copy(part.random_erasing), None
        for steps in _transform_steps(part):
            if steps and isinstance(steps[-1], RandomErasing):
                taken = copy.copy(steps.pop())
                taken.num_splits = 0  # ignored for single images, but not for batches
    return taken


def _transform_steps(part) -> Iterator[list]:
    """Iterate over the lists of steps in the transforms of a data set."""
    scheduled = getattr(part, "transforms", ())  # a tuple in timm's ScheduledTransformDataset
    for transform in (getattr(part, "transform", None), *(scheduled if isinstance(scheduled, tuple) else ())):
        steps = getattr(transform, "transforms", None)
        if isinstance(steps, list):
            yield steps


def _flow_mixup(flow, layers: list, data_config: Mapping | None, keywords: dict) -> FlowMixupTransform:
    if not isinstance(flow, str | Path | FlowMixupTransform | tuple):
        raise ValueError(f"flow is {flow!r} of type {type(flow).__name__}; expected {AS_TEXT}")
    mean, std = _normalisation(layers[0], data_config)
    if isinstance(flow, FlowMixupTransform):
        _check_transform(flow, mean, std, keywords)
        return flow
    defaults = {"mean": mean, "std": std, "class_names": _class_names(layers), "process_index": _process_index()}
    keywords = defaults | keywords
    if isinstance(flow, tuple):
        return FlowMixupTransform(*flow, **keywords)
    return FlowMixupTransform.from_pretrained(flow, **keywords)


def _normalisation(loader, data_config: Mapping | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel; averaged if their number differs, as in timm's loader."""
    if data_config is None:
        raise ValueError("data_config is missing; pass the result of timm.data.resolve_data_config for the model")
    channels = data_config["input_size"][0]
    pair = (tuple(data_config[name]) for name in ("mean", "std"))
    mean, std = (v if len(v) == channels else (sum(v) / len(v),) * channels for v in pair)
    if isinstance(loader, PrefetchLoader):
        actual = torch.stack([loader.mean, loader.std]).float().cpu().reshape(2, -1) / 255
        if not torch.allclose(actual, torch.tensor([mean, std]), rtol=0.01):
            raise ValueError(
                f"the loader normalises with mean, std {actual.tolist()} but data_config says {[mean, std]}; "
                "pass the data_config that the loader was created with"
            )
    return mean, std


def _check_transform(transform: FlowMixupTransform, mean, std, keywords: dict) -> None:
    if keywords:
        raise ValueError(f"{sorted(keywords)} cannot be changed on a FlowMixupTransform; pass them when you create it")
    expected = torch.stack([v.flatten().cpu().expand(len(mean)) for v in (transform.mean, transform.std)])
    if not torch.allclose(expected, torch.tensor([mean, std]), rtol=0.01):
        raise ValueError(
            f"the FlowMixupTransform expects mean, std {expected.tolist()} but the loader's images are normalised with "
            f"{[mean, std]}; create it with mean=data_config['mean'], std=data_config['std']"
        )


def _class_names(layers: list) -> tuple[str, ...] | None:
    """Return the class names of the innermost data set in label order, or None if it has none."""
    dataset = layers[-1]
    label_of = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not isinstance(label_of, Mapping) or not all(isinstance(name, str) for name in label_of):
        return None
    names = sorted(label_of, key=lambda name: label_of[name])
    return tuple(names) if [label_of[n] for n in names] == list(range(len(names))) else None


def _process_index() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
