"""State of a running training on disk, as safetensors + JSON: a killed run resumes from it, nothing is unpickled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowaug.files import pack, temporary_name, write_atomic

LOCK_TIMEOUT_S = 10  # seconds to wait for a folder: the loaders' workers of a killed run notice it after 5
_TENSOR = "__tensor__"


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        return [[k, _split(v, f"{path}/{k}", tensors)] for k, v in value.items()]
    if isinstance(value, list | tuple):
        return {"items": [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return {k: _join(v, tensors) for k, v in tree}
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if "items" in tree:
        return [_join(v, tensors) for v in tree["items"]]
    return tree["value"]


def save_state(path: Path, state: dict) -> None:
    """Write nested dictionaries and lists of tensors and JSON values to one file, atomically.

    The structure travels in the header of the safetensors file, so that one rename publishes both.
    """
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "state", tensors)
    write_atomic(path, pack(tensors, {"tree": json.dumps(tree)}))


def load_state(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read what ``save_state`` wrote.

    Raises:
        ValueError: the file is truncated or not a state.
    """
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads(file.metadata()["tree"])
        return _join(tree, load_file(path, device=str(device)))
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable training state ({error}); delete it to start from the beginning"
        ) from error


@contextmanager
def exclusive_folder(folder: Path, main: bool = True) -> Iterator[None]:
    """Keep a folder for one run, by a lock file that goes when the run ends and binds nobody when it is killed.

    Args:
        folder: the run's output folder, made if it is not there.
        main: whether this is the process that writes; the others of a run pass.

    Raises:
        ValueError: another run holds the folder.
    """
    if not main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout as error:
        raise ValueError(
            f"another run is writing to {folder}; wait for it to end, or give this one another --output"
        ) from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes the file of a lock itself
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class TrainingState:
    """The parts of a training that change from step to step, saved and restored together.

    Args:
        folder: the run's output folder; the state is a file in it.
        recipe: the options that decide its numbers; a state of other options is refused.
        *parts: objects with ``state_dict`` and ``load_state_dict``: modules, optimisers, logs.
    """

    def __init__(self, folder: Path, recipe: dict, *parts):
        self.path, self.recipe, self.parts = folder / "state.safetensors", recipe, parts

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, atomically."""
        parts = [part.state_dict() for part in self.parts]
        save_state(self.path, {"step": step, "recipe": self.recipe, "parts": parts})

    def restore(self) -> int:
        """Load a state in place, if there is one, and return the step to go on from.

        Raises:
            ValueError: the state is damaged, or of a run with other options.
        """
        if not self.path.is_file():
            return 0
        state = load_state(self.path)
        differ = sorted(k for k in self.recipe if self.recipe[k] != state["recipe"].get(k))
        if differ:
            raise ValueError(
                f"{self.path} is of a run with other options ({', '.join(differ)}); use --resume never or another "
                "--output"
            )
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(values)
        return state["step"]

    def discard(self) -> None:
        """Remove the state of a run that has ended, and what a kill in the middle of writing one left."""
        for leftover in (self.path, temporary_name(self.path)):
            leftover.unlink(missing_ok=True)
