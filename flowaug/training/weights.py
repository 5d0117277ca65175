"""Pretrained weights of a classifier: timm's own, or those of a file."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")


def weight_keywords(
    model: str,
    pretrained: bool | None,
    checkpoint: Path | None,
    model_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the keywords that tell ``timm.create_model`` where the weights are.

    Args:
        model: timm model.
        pretrained: start from timm's weights; None for "where timm has some".
        checkpoint: file of weights, or None.
        model_kwargs: further arguments of the model's constructor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or those of another architecture.
    """
    if checkpoint is None:
        available = timm.models.is_model_pretrained(model)
        return {"pretrained": available if pretrained is None else pretrained}
    tensors = read_checkpoint(checkpoint, model, model_kwargs)
    config = timm.models.get_pretrained_cfg(model.split(":")[-1])
    head = tensors.get(f"{_head_name(config)}.weight")
    overlay = {
        "state_dict": tensors,
        "num_classes": len(head) if head is not None else 0,
        "source": "",
        "custom_load": False,
    }
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _head_name(config) -> str:
    head = config.classifier if config is not None else None
    return head if isinstance(head, str) else ""


def read_checkpoint(path: Path, name: str, model_kwargs: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the weights of a timm model from a file.

    Weights of another code base, under other names, are matched one for one by order and shape.

    Args:
        path: ``.safetensors``, or a ``.pth`` that holds tensors only: nothing else is unpickled.
        name: timm model.
        model_kwargs: further arguments of its constructor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or those of another architecture.
    """
    if not Path(path).is_file() or not Path(path).name.endswith(WEIGHT_FILES):
        raise FileNotFoundError(f"no weights at {str(path)!r}; expected a file ending in {', '.join(WEIGHT_FILES)}")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own
        raise ValueError(
            f"{path} holds no weights that can be read safely ({type(error).__name__}: {error})"
        ) from error
    with torch.device("meta"):
        expected = timm.create_model(name, **(model_kwargs or {})).state_dict()
    if set(expected) & set(tensors):
        return tensors
    return _match_by_order(tensors, expected, path, name)


def describe_misfit(path: Path, model: str, keywords: dict[str, Any], channels: int, error: Exception) -> str:
    """Return one sentence on why the weights of a file do not fit a model.

    Args:
        path: the file.
        model: timm model.
        keywords: result of :func:`weight_keywords`.
        channels: channels of the data.
        error: what loading them raised.
    """
    config = timm.models.get_pretrained_cfg(model.split(":")[-1])
    stem = config.first_conv if config is not None and isinstance(config.first_conv, str) else ""
    weight = keywords["pretrained_cfg_overlay"]["state_dict"].get(f"{stem}.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[1] not in (3, channels):
        found = f"{weight.shape[1]} channel{'s' if weight.shape[1] > 1 else ''}"
        return (
            f"{path} holds weights of {model!r} for images of {found}, the data has {channels}; give weights for "
            f"images of {' or '.join(map(str, sorted({channels, 3})))} channels"
        )
    reason = " ".join(" ".join(str(error).splitlines()[1:2] or [str(error)]).split())[:150]
    return (
        f"{path} does not fit {model!r}, it is of another architecture ({reason}); give the model that it belongs to "
        "with --model, and its arguments with --model-kwargs"
    )


def _match_by_order(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path, name: str) -> dict:
    theirs, ours = ([tuple(t.shape) for t in part.values()] for part in (tensors, expected))
    if theirs != ours:
        raise ValueError(
            f"{path} has other names than {name!r}, and its {len(theirs)} tensors do not match the model's {len(ours)} "
            "in order and shape; it belongs to another architecture"
        )
    return dict(zip(expected, tensors.values(), strict=True))
