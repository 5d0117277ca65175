"""Files: atomic writes, JSON, packed tensors and markdown tables."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save as save_bytes
from torch import Tensor


def temporary_name(path: Path) -> Path:
    """The name a file has until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: a reader sees the old file or the new, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror}); free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write a dictionary as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def pack(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Serialise tensors, wherever they live, as one safetensors file."""
    return save_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def markdown_table(header: Sequence[str], rows: Iterable[Iterable]) -> str:
    """A table in markdown; a bar in a cell does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
