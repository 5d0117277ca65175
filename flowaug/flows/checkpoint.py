"""Trained flows on disk: a folder of ``config.json`` and ``*.safetensors``. Nothing is ever unpickled.

A flow is named by a folder, a bundled name (``list_pretrained()``), ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from flowaug.files import pack, write_atomic, write_json
from flowaug.flows.flow import Flow
from flowaug.flows.registry import create_flow
from flowaug.latents.pca import ClasswisePCA

CONFIG, WEIGHTS, PCA = "config.json", "model.safetensors", "pca.safetensors"
FORMAT = "flowaug-1"
BUNDLED = Path(__file__).parent.parent / "pretrained"


def list_pretrained() -> list[str]:
    """Names of the trained flows that ship with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def save_flow(flow: Flow, folder: str | Path, pca: ClasswisePCA | None = None, **extra) -> Path:
    """Write a flow, and its class axes, to a folder.

    Args:
        flow: the flow; made by ``create_flow``, so that its config can build it again.
        folder: where to; made when absent.
        pca: the class PCA to mix along.
        **extra: JSON values to keep in ``config.json``, for example ``class_names`` and ``recipe``.

    Returns:
        The folder.
    """
    if flow.frozen:
        raise ValueError("this flow is frozen, its parameters are folded; save the flow it was frozen from")
    if "architecture" not in flow.config:
        raise ValueError("this flow has no config to build it again; make it with flowaug.create_flow")
    folder = Path(folder)
    files = {WEIGHTS: pack(flow.state_dict())}
    if pca is not None:
        files[PCA] = pack(pca.tensors())
    for name, data in files.items():
        write_atomic(folder / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_json(folder / CONFIG, {"format": FORMAT, **flow.config, **extra, "sha256": digests})
    return folder


def find_flow(source: str | Path) -> Path:
    """Folder of the flow that ``source`` names.

    Raises:
        FileNotFoundError: when there is no such flow, with the bundled names.
    """
    scheme, _, rest = str(source).partition(":")
    if scheme == "hf-hub":
        return _download(rest)
    folder = Path(rest if scheme == "local-dir" else source)
    bundled = BUNDLED / str(source)
    for candidate in (folder, bundled):
        if (candidate / CONFIG).is_file():
            return candidate
    raise FileNotFoundError(
        f"no flow at {str(source)!r}: expected a folder with {CONFIG} and {WEIGHTS} (train_flow.py writes one), "
        f"a bundled name ({', '.join(list_pretrained())}), local-dir:FOLDER or hf-hub:ORG/NAME"
    )


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))


def read_config(source: str | Path) -> dict:
    """Read and check the ``config.json`` of a flow.

    Raises:
        ValueError: when it is not JSON, or not a flow's.
    """
    path = find_flow(source) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); the checkpoint is damaged, save or copy it again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path} is not a flowaug checkpoint of format {FORMAT!r}; train one with train_flow.py")
    return config


def _read_tensors(folder: Path, name: str, config: dict) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the folder is incomplete, copy it again or run train_flow.py again"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"].get(name):
        raise ValueError(
            f"{path} ({len(data)} bytes) does not belong to the {CONFIG} beside it: truncated, damaged or from another "
            "save; copy the whole folder again or run train_flow.py again"
        )
    try:
        return load_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); save or copy it again") from error


def load_flow(source: str | Path, device: torch.device | str = "cpu") -> Flow:
    """Load a trained flow, in eval mode and without gradients.

    Args:
        source: folder, bundled name, ``local-dir:`` or ``hf-hub:``.
        device: where to put it.

    Raises:
        FileNotFoundError: no such flow, or a file of it is missing.
        ValueError: a damaged or foreign checkpoint.
    """
    config = read_config(source)
    shape, overrides = tuple(config["event_shape"]), config["overrides"]
    keys = ("num_classes", "grey_levels")
    flow = create_flow(config["architecture"], event_shape=shape, **{k: config[k] for k in keys}, **overrides)
    tensors = _read_tensors(find_flow(source), WEIGHTS, config)
    try:
        flow.load_state_dict(tensors)
    except RuntimeError as error:
        reason = "its weights are those of another version of flowaug or of another architecture"
        raise ValueError(f"the flow at {str(source)!r} does not fit {config['architecture']}: {reason}") from error
    flow.class_names = tuple(config["class_names"]) if config.get("class_names") else None
    return flow.to(device).eval().requires_grad_(False)


def load_pca(source: str | Path, device: torch.device | str = "cpu") -> ClasswisePCA:
    """Load the class axes that were saved beside a flow."""
    return ClasswisePCA.from_tensors(_read_tensors(find_flow(source), PCA, read_config(source))).to(device)
