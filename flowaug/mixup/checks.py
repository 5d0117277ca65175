"""Input checks of flow mixup. Each error says what was found, what is expected and what to do."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA

INPUT_TOLERANCE = 0.05  # resizing and normalisation may take pixels this far outside [0, 1]


def check_class_names(flow_names: Sequence[str] | None, data_names: Sequence[str] | None) -> None:
    """Check that the flow and the data set have the same classes in the same order.

    Args:
        flow_names: class names of the flow in label order, or None if unknown.
        data_names: class names of the data set in label order, or None if unknown.

    Raises:
        ValueError: if the names differ; the message gives the first difference.
    """
    if flow_names is None or data_names is None or tuple(flow_names) == tuple(data_names):
        return

    if len(flow_names) != len(data_names):
        raise ValueError(
            f"the flow has {len(flow_names)} classes but the data set has {len(data_names)}; "
            "train a flow on this data set"
        )

    label = next(i for i, (a, b) in enumerate(zip(flow_names, data_names, strict=True)) if a != b)
    raise ValueError(
        f"class {label} is {data_names[label]!r} in the data set but {flow_names[label]!r} in the flow; "
        "use the class order of the flow, or train a flow on this data set"
    )


def check_pair(flow: Flow, pca: ClasswisePCA) -> None:
    """Check that a flow and principal components have the same number of classes and dimensions.

    Raises:
        ValueError: if they differ.
    """
    flow_shape, pca_shape = tuple(flow.gaussians.mean.shape), (pca.num_classes, pca.dim)
    if flow_shape != pca_shape:
        raise ValueError(
            f"the flow has (classes, dimensions) {flow_shape} but the principal components have {pca_shape}; "
            "load both from the same folder"
        )


def channel_constants(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a normalisation as tensors (C, 1, 1); 0 and 1 if not given.

    Args:
        mean: one number per channel: a sequence, an array or a tensor.
        std: likewise, positive.

    Raises:
        ValueError: if only one is given, or a number is out of range.
    """
    if (mean is None) != (std is None):
        raise ValueError("pass both mean and std of the classifier's normalisation, or neither for images in [0, 1]")
    shift = torch.as_tensor([0.0] if mean is None else mean, dtype=torch.float32)
    scale = torch.as_tensor([1.0] if std is None else std, dtype=torch.float32)
    finite = bool(shift.isfinite().all() and scale.isfinite().all())
    if shift.ndim != 1 or shift.shape != scale.shape or not finite or not (scale > 0).all():
        raise ValueError(
            f"mean is {shift.tolist()} and std is {scale.tolist()}; expected one finite number per channel each, std "
            "positive"
        )
    return shift[:, None, None], scale[:, None, None]


def check_numbers(batch_size: int, redraws: int, seed: int, process_index: int, max_outside: float) -> None:
    """Check the numbers that a transform is created with.

    Raises:
        ValueError: if one is of another type or out of range.
    """
    least = {
        "batch_size": (batch_size, 1),
        "redraws": (redraws, 0),
        "seed": (seed, 0),
        "process_index": (process_index, 0),
    }
    for name, (value, lower) in least.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < lower:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {lower}")
    if not isinstance(max_outside, Real) or not 0 <= max_outside <= 1:
        raise ValueError(f"max_outside is {max_outside!r}; expected a fraction of the pixels from 0 to 1")


def check_batch(x: Tensor, y: Tensor, device: torch.device, constants: int) -> None:
    """Check shapes, types and devices of a batch.

    Args:
        x: images; expected shape (B, C, H, W), floating point or uint8.
        y: labels; expected integers (B,).
        device: device of the flow.
        constants: number of channels of the normalisation; 1 serves any number.

    Raises:
        ValueError: if a shape, the type of the labels or a device does not match.
        TypeError: if a value is not a tensor, or the images are neither floating point nor uint8.
    """
    for name, value in (("images", x), ("labels", y)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the {name} are {type(value).__name__}, expected a tensor; convert them with torch.as_tensor"
            )
    if x.ndim != 4:
        raise ValueError(
            f"expected images (B, C, H, W), got shape {tuple(x.shape)}; add the batch dimension with x[None]"
        )
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(f"expected floating-point or uint8 images, got {x.dtype}")

    if constants not in (1, x.shape[1]):
        raise ValueError(
            f"mean and std have {constants} channels but the images have {x.shape[1]}; pass one number per channel"
        )
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(
            f"expected integer labels (B,), got {y.dtype} of shape {tuple(y.shape)}; flow mixup needs hard labels, so "
            "apply it before Mixup, CutMix or label smoothing"
        )
    if len(x) != len(y):
        raise ValueError(
            f"y has {len(y)} labels but x has {len(x)} images; FlowMixupTransform needs one label per image"
        )

    if x.device != device or y.device != device:
        raise ValueError(
            f"the images are on {x.device}, the labels on {y.device} and the flow on {device}; "
            "call transform.to(x.device) once"
        )


def check_labels(y: Tensor, num_classes: int) -> None:
    """Check that all labels ``y`` (B,) are classes of the flow.

    Raises:
        ValueError: if a label is not in 0 … num_classes − 1.
    """
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(
            f"the labels range from {int(y.min())} to {int(y.max())} but the flow has {num_classes} classes, 0 to "
            f"{num_classes - 1}; pass unknown='skip' to leave samples of other classes unchanged, or use a flow "
            "trained on these classes"
        )


def check_range(pixels: Tensor) -> None:
    """Check that the finite values of images are in [0, 1], up to a tolerance.

    Args:
        pixels: images of any shape, after undoing the normalisation.

    Raises:
        ValueError: if a finite value is out of range.
    """
    pixels = pixels[pixels.isfinite()]
    if len(pixels) and not -INPUT_TOLERANCE <= pixels.min() <= pixels.max() <= 1 + INPUT_TOLERANCE:
        raise ValueError(
            f"the pixels range from {pixels.min():.3g} to {pixels.max():.3g} after undoing mean and std, not [0, 1]; "
            "pass the mean and std of the normalisation of your images, or pass images in [0, 1] or uint8"
        )
