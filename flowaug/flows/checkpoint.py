"""Checkpoints of trained flows: a folder with ``config.json`` and ``*.safetensors`` files. Pickle is not used.

The source of a checkpoint is a folder, the name of a bundled flow (``list_pretrained()``), ``local-dir:FOLDER`` or
``hf-hub:ORG/NAME``, optionally with ``@REVISION``. A checkpoint is not trusted: its config is checked against one table
of keys and types, its sizes against the header of the weight file before anything is allocated, and its values.
"""

import hashlib
import json
import math
from pathlib import Path

import torch

from flowaug.files import pack, write_atomic, write_json
from flowaug.flows.config_file import FORMAT, check_config, parse_config
from flowaug.flows.flow import Flow
from flowaug.flows.sources import BUNDLED, CONFIG, PCA, WEIGHTS, find_flow, list_pretrained
from flowaug.flows.weight_file import build_flow, fill, read_header, read_tensors
from flowaug.latents.pca import ClasswisePCA
from flowaug.latents.pca_checks import check_header, read_pca

__all__ = [
    "BUNDLED",
    "CONFIG",
    "FORMAT",
    "PCA",
    "WEIGHTS",
    "find_flow",
    "flow_digest",
    "list_pretrained",
    "load_flow",
    "load_pca",
    "read_config",
    "save_flow",
]


def save_flow(flow: Flow, folder: str | Path, pca: ClasswisePCA | None = None, **extra) -> Path:
    """Save a flow, and optionally the principal components of its classes, to a folder.

    Every file is written atomically. ``config.json`` is written last and contains the SHA-256 digests of the others.

    Args:
        flow: the flow, made by ``create_flow`` or ``load_flow``.
        folder: target folder; created if it does not exist.
        pca: class PCA used for mixup.
        **extra: JSON values to store in ``config.json``: ``class_names``, ``mixup``, ``recipe`` and ``data``.

    Returns:
        The folder.

    Raises:
        ValueError: if the flow is frozen or was not made by ``create_flow``, or ``extra`` has a key or value that
            ``load_flow`` would refuse.
        OSError: if a file cannot be written.

    Example:
        >>> import tempfile
        >>> from flowaug import create_flow
        >>> flow = create_flow("mef_tiny", event_shape=(1, 8, 8), num_classes=3, hidden=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_flow(flow, folder, class_names=["ant", "bee", "cat"])
        ...     load_flow(path).class_names
        ('ant', 'bee', 'cat')
    """
    if flow.frozen:
        raise ValueError("this flow is frozen and its parameters are fused; save the flow it was frozen from")
    if "architecture" not in flow.config:
        raise ValueError(
            "this flow has no config, so it could not be loaded again; make the flow with flowaug.create_flow"
        )

    folder = Path(folder)
    files = {WEIGHTS: pack(flow.state_dict())}
    if pca is not None:
        files[PCA] = pack(pca.tensors())

    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    config = json.loads(json.dumps({"format": FORMAT, **flow.config, **extra, "sha256": digests}))  # tuples: lists
    check_config(folder / CONFIG, config)
    for name, data in files.items():
        write_atomic(folder / name, data)
    write_json(folder / CONFIG, config)
    return folder


def read_config(source: str | Path) -> dict:
    """Read and check the ``config.json`` of a checkpoint.

    Args:
        source: folder, bundled name, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is not valid JSON, not the config of a flow, or has a missing, unknown or wrong entry.
    """
    return parse_config(find_flow(source) / CONFIG)


def load_flow(source: str | Path, device: torch.device | str = "cpu") -> Flow:
    """Load a trained flow.

    Args:
        source: folder, bundled name (see ``list_pretrained``), ``local-dir:FOLDER`` or
            ``hf-hub:ORG/NAME``, optionally with ``@REVISION``.
        device: device of the flow.

    Returns:
        The flow, in eval mode and without gradients.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if the checkpoint is damaged or not that of a flow.

    Example:
        >>> flow = load_flow("digits")
        >>> flow.event_shape, flow.gaussians.num_classes
        ((1, 8, 8), 10)
    """
    folder = find_flow(source)
    config, path = parse_config(folder / CONFIG), folder / WEIGHTS
    flow = build_flow(path, config, read_header(path))
    fill(path, flow, read_tensors(path, config["sha256"][WEIGHTS]))
    flow.class_names = tuple(config["class_names"]) if config.get("class_names") else None
    return flow.to(device)


def load_pca(source: str | Path, device: torch.device | str = "cpu") -> ClasswisePCA:
    """Load the class PCA that was saved with a flow.

    Args:
        source: folder, bundled name (see ``list_pretrained``), ``local-dir:FOLDER`` or
            ``hf-hub:ORG/NAME``, optionally with ``@REVISION``.
        device: device of the PCA.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or it has no PCA.
        ValueError: if the checkpoint is damaged or not that of a flow.

    Example:
        >>> load_pca("digits").axes.shape  # classes, principal components, dimensions of the latents
        torch.Size([10, 32, 64])
    """
    folder = find_flow(source)
    config, path = parse_config(folder / CONFIG), folder / PCA
    check_header(path, read_header(path), config["num_classes"], math.prod(config["event_shape"]))
    return read_pca(path, read_tensors(path, config["sha256"].get(PCA, ""))).to(device)


def flow_digest(source: str | Path) -> str:
    """Return a short digest of a flow's weights and principal components.

    Raises:
        FileNotFoundError: no such flow.
        ValueError: a damaged or foreign checkpoint.
    """
    return "-".join(digest[:16] for digest in read_config(source)["sha256"].values())
