"""What a batch, a flow and a data set must have in common; every message says what came, what fits and the way out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA


def check_class_names(flow_names: Sequence[str] | None, data_names: Sequence[str] | None) -> None:
    """Raise a ValueError with the first mismatch when a flow was trained on other classes or in another order."""
    if flow_names is None or data_names is None or tuple(flow_names) == tuple(data_names):
        return
    if len(flow_names) != len(data_names):
        raise ValueError(
            f"the flow knows {len(flow_names)} classes but the data set has {len(data_names)}: train one on this data"
        )
    label = next(i for i, (a, b) in enumerate(zip(flow_names, data_names, strict=True)) if a != b)
    raise ValueError(
        f"class {label} is {data_names[label]!r} in the data set but {flow_names[label]!r} in the flow; "
        "use the class order the flow was trained with, or train a flow on this data"
    )


def check_pair(flow: Flow, pca: ClasswisePCA) -> None:
    """Raise a ValueError when flow and axes are of different classes or dimensions."""
    ours, theirs = tuple(flow.gaussians.mean.shape), (pca.num_classes, pca.dim)
    if ours != theirs:
        raise ValueError(
            f"the flow has (classes, dimensions) {ours} but the class axes {theirs}; load both from one folder"
        )


def check_batch(x: Tensor, y: Tensor, device: torch.device) -> None:
    """Raise unless ``x`` are images (B, C, H, W) and ``y`` integer labels (B,), both on the flow's device."""
    if x.ndim != 4:
        raise ValueError(
            f"expected images (B, C, H, W), got shape {tuple(x.shape)}; add the batch dimension with x[None]"
        )
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(f"expected floating-point or uint8 images, got {x.dtype}")
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"expected integer labels (B,), got {y.dtype} of shape {tuple(y.shape)}; flow mixup keeps labels hard, so "
            "apply it before Mixup, CutMix or label smoothing"
        )
    if len(x) != len(y):
        raise ValueError(
            f"y has {len(y)} labels but x has {len(x)} images; FlowMixupTransform needs one label per image"
        )
    if x.device != device or y.device != device:
        raise ValueError(
            f"images on {x.device}, labels on {y.device}, flow on {device}; call transform.to(x.device) once"
        )
