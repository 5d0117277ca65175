"""Where checkpoints are: folders, bundled flows, and repositories of the Hugging Face Hub."""

import functools
from pathlib import Path

CONFIG, WEIGHTS, PCA = "config.json", "model.safetensors", "pca.safetensors"
BUNDLED = Path(__file__).parent.parent / "pretrained"
HUB_FORM = "hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"


def list_pretrained() -> list[str]:
    """Return the names of the trained flows that are bundled with the package.

    Example:
        >>> list_pretrained()
        ['digits', 'fashion_mnist']
    """
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def find_flow(source: str | Path) -> Path:
    """Return the folder of a checkpoint. Downloads it first if it is on the Hugging Face Hub.

    Args:
        source: folder, bundled name, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``, optionally with ``@REVISION`` (a
            branch, a tag or a commit).

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the source is not text or a path, or not a valid name of a repository.
        OSError: if it cannot be downloaded.
    """
    if not isinstance(source, str | Path):
        raise ValueError(f"the flow is {source!r}; expected a folder, a bundled name or {HUB_FORM}")
    scheme, _, rest = str(source).partition(":")
    if scheme == "hf-hub":
        return _hub_folder(rest)

    folder = Path(rest if scheme == "local-dir" else source)
    bundled = BUNDLED / str(source)
    for candidate in (folder, bundled):
        if (candidate / CONFIG).is_file():
            return candidate
    raise FileNotFoundError(
        f"no flow at {str(source)!r}: expected a folder with {CONFIG} and {WEIGHTS} (made by flowaug train-flow), "
        f"a bundled name ({', '.join(list_pretrained())}), local-dir:FOLDER or {HUB_FORM}"
    )


def _hub_folder(name: str) -> Path:
    if not (_download(name) / CONFIG).is_file():
        _download.cache_clear()  # the cache on disk was removed
    folder = _download(name)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"hf-hub:{name} has no {CONFIG}, so it is not a flow; expected a repository made by flowaug train-flow"
        )
    return folder


@functools.cache
def _download(name: str) -> Path:
    """Download one snapshot of a repository. Kept for the process, so that all files are from the same commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, at, revision = name.partition("@")
    if at and not revision:
        raise ValueError(f"hf-hub:{name} has no revision after the @; expected {HUB_FORM}")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
    except HFValidationError as error:
        raise ValueError(f"hf-hub:{name} is not the name of a repository ({error}); expected {HUB_FORM}") from error
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(
            f"hf-hub:{name} cannot be downloaded ({reason}); check the name, the revision and the connection, or pass "
            "a local folder"
        ) from error
    return Path(folder)
