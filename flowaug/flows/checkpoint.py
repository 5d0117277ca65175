"""Checkpoints of trained flows: a folder with ``config.json`` and ``*.safetensors`` files. Pickle is not used.

The source of a checkpoint is a folder, the name of a bundled flow (``list_pretrained()``), ``local-dir:FOLDER`` or
``hf-hub:ORG/NAME``.
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
    """Return the names of the trained flows that are bundled with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def save_flow(flow: Flow, folder: str | Path, pca: ClasswisePCA | None = None, **extra) -> Path:
    """Save a flow, and optionally the principal components of its classes, to a folder.

    Every file is written atomically. ``config.json`` is written last and contains the SHA-256 digests of the others.

    Args:
        flow: the flow, made by ``create_flow`` or ``load_flow``.
        folder: target folder; created if it does not exist.
        pca: class PCA used for mixup.
        **extra: JSON values to store in ``config.json``, for example ``class_names`` and ``recipe``.

    Returns:
        The folder.

    Raises:
        ValueError: if the flow is frozen or was not made by ``create_flow``.
        OSError: if a file cannot be written.
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

    for name, data in files.items():
        write_atomic(folder / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_json(folder / CONFIG, {"format": FORMAT, **flow.config, **extra, "sha256": digests})
    return folder


def find_flow(source: str | Path) -> Path:
    """Return the folder of a checkpoint. Downloads it first if the source is ``hf-hub:ORG/NAME``.

    Args:
        source: folder, bundled name, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
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
        f"no flow at {str(source)!r}: expected a folder with {CONFIG} and {WEIGHTS} (made by flowaug train-flow), "
        f"a bundled name ({', '.join(list_pretrained())}), local-dir:FOLDER or hf-hub:ORG/NAME"
    )


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))


def read_config(source: str | Path) -> dict:
    """Read and check the ``config.json`` of a checkpoint.

    Args:
        source: folder, bundled name, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the file is not valid JSON or not the config of a flow.
    """
    path = find_flow(source) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); the checkpoint is damaged, copy or save it again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a flowaug checkpoint of format {FORMAT!r}; make one with flowaug train-flow or save_flow"
        )
    return config


def _read_tensors(folder: Path, name: str, config: dict) -> dict[str, Tensor]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the checkpoint is incomplete, copy the whole folder again or train the flow again"
        )

    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != config["sha256"].get(name):
        raise ValueError(
            f"{path} ({len(data)} bytes) does not match the digest in {CONFIG}: it is truncated, damaged or from "
            "another save; copy the whole folder again or train the flow again"
        )

    try:
        return load_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); copy or save it again") from error


def load_flow(source: str | Path, device: torch.device | str = "cpu") -> Flow:
    """Load a trained flow.

    Args:
        source: folder, bundled name (see ``list_pretrained``), ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.
        device: device of the flow.

    Returns:
        The flow, in eval mode and without gradients.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
        ValueError: if the checkpoint is damaged or not that of a flow.
    """
    config = read_config(source)
    flow = create_flow(
        config["architecture"],
        event_shape=tuple(config["event_shape"]),
        num_classes=config["num_classes"],
        grey_levels=config["grey_levels"],
        **config["overrides"],
    )

    tensors = _read_tensors(find_flow(source), WEIGHTS, config)
    try:
        flow.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of the flow at {str(source)!r} do not fit the architecture {config['architecture']}: they "
            "are from another version of flowaug or another architecture; train the flow again"
        ) from error

    flow.class_names = tuple(config["class_names"]) if config.get("class_names") else None
    return flow.to(device).eval().requires_grad_(False)


def load_pca(source: str | Path, device: torch.device | str = "cpu") -> ClasswisePCA:
    """Load the class PCA that was saved with a flow.

    Args:
        source: folder, bundled name (see ``list_pretrained``), ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.
        device: device of the PCA.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or it has no PCA.
        ValueError: if the checkpoint is damaged or not that of a flow.
    """
    tensors = _read_tensors(find_flow(source), PCA, read_config(source))
    return ClasswisePCA.from_tensors(tensors).to(device)


def flow_digest(source: str | Path) -> str:
    """Return a short digest of a flow's weights and principal components.

    Raises:
        FileNotFoundError: no such flow.
        ValueError: a damaged or foreign checkpoint.
    """
    return "-".join(digest[:16] for digest in read_config(source)["sha256"].values())
