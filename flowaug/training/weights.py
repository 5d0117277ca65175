"""Pretrained weights of a classifier: timm's, or those of a file."""

import argparse
from pathlib import Path

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


def _weights(args: argparse.Namespace) -> dict:
    """How timm is to find the weights."""
    if args.checkpoint is None:
        published = timm.models.is_model_pretrained(args.model) if args.pretrained is None else args.pretrained
        return {"pretrained": published and not args.dry_run}  # a plan downloads nothing
    tensors = read_checkpoint(args.checkpoint, args.model, args.model_kwargs)
    config = timm.models.get_pretrained_cfg(args.model.split(":")[-1])
    head = tensors.get(f"{_head(config)}.weight")
    overlay = {"state_dict": tensors, "num_classes": len(head) if head is not None else 0, "source": ""}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay | {"custom_load": False}}


def _head(config) -> str:
    head = config.classifier if config is not None else None
    return head if isinstance(head, str) else ""


def read_checkpoint(path: Path, name: str, model_kwargs: dict | None = None) -> dict[str, Tensor]:
    """Weights of a timm model from a file; the names of another code base are matched one for one, by order.

    Args:
        path: ``.safetensors``, or a ``.pth`` that holds tensors only: nothing else is unpickled.
        name: timm model.
        model_kwargs: further arguments of its constructor.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not weights, or of another architecture.
    """
    if not Path(path).is_file() or Path(path).suffix not in WEIGHT_FILES:
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


def _match_by_order(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path, name: str) -> dict:
    theirs, ours = ([tuple(t.shape) for t in part.values()] for part in (tensors, expected))
    if theirs != ours:
        raise ValueError(
            f"{path} has other names than {name!r} and its {len(theirs)} tensors do not match the model's {len(ours)} "
            "in order and shape; it belongs to another architecture"
        )
    return dict(zip(expected, tensors.values(), strict=True))
