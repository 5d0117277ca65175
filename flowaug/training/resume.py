"""Interrupted and finished runs: training states on disk, the lock of an output folder, and the mark of a finished run.

States are safetensors files whose header holds the structure as JSON; nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowaug.files import leftovers, pack, write_atomic, write_json
from flowaug.training.runtime import StoppedError, StopRequest, any_process

LOCK_TIMEOUT_S = 10  # the data loader workers of a killed run notice it after 5 seconds
STATE, PREVIOUS_STATE, FINISHED = "state.safetensors", "state.previous.safetensors", "run.json"
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


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors and JSON values to one file, atomically, with a checksum."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_split(state, "state", tensors))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, pack(tensors, {"tree": tree, "sha256": _checksum(tree, tensors)}))


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Raises:
        ValueError: the file is truncated, damaged or not a state.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if metadata["sha256"] != _checksum(metadata["tree"], tensors):
            raise ValueError("its checksum differs")
        return _join(json.loads(metadata["tree"]), {name: tensor.to(device) for name, tensor in tensors.items()})
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable training state ({error})") from error


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FolderInUseError(ValueError):
    """An output folder that another run has locked."""


@contextmanager
def exclusive_folder(folder: Path, main: bool = True) -> Iterator[None]:
    """Lock an output folder for one run; the lock of a killed run does not hold.

    Args:
        folder: the run's output folder; created if it does not exist.
        main: whether this is the process that writes; the other processes of a run do not lock.

    Raises:
        FolderInUseError: another run has locked the folder; raised by all processes of this run.
        OSError: the folder cannot be written to.
    """
    lock = FileLock(folder / ".lock")
    if any_process(main and not _acquire(lock, folder)):
        raise FolderInUseError(f"another run is writing to {folder}; wait for it to end, or choose another --output")
    if not main:
        yield
        return
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes the file of a lock itself
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> bool:
    """Return whether the lock was acquired, or is another run's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        return False
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder} ({error.strerror}); choose another --output") from error
    return True


def wait_until_free(folder: Path, main: bool = True) -> None:
    """Wait until no other run writes to a folder."""
    while True:
        try:
            with exclusive_folder(folder, main):
                return
        except FolderInUseError:
            continue


def is_finished(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether the folder holds the finished run of this identity.

    Args:
        folder: the run's output folder.
        identity: what decides the results of the run, as JSON values.
        overwrite: train again whatever the folder holds.

    Raises:
        ValueError: the folder holds another finished run.
    """
    mark = folder / FINISHED
    if overwrite or any((folder / name).is_file() for name in (STATE, PREVIOUS_STATE)):
        return False
    if not mark.is_file():
        if (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds a finished model; choose another --output, or pass --overwrite")
        return False
    differing = _differences(json.loads(mark.read_text(encoding="utf-8")), identity)
    if differing:
        raise ValueError(
            f"{folder} holds a finished run with another {differing}; choose another --output, or pass --overwrite"
        )
    return True


def mark_finished(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write the mark of a finished run, after all its outputs."""
    write_json(folder / FINISHED, dict(identity))


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return the names of options and other facts that differ between two identities, for a message."""
    ours = json.loads(json.dumps(ours))
    options = [theirs.get("options", {}), ours["options"]]
    names = sorted(name for name in ours["options"] if options[0].get(name) != options[1][name])
    facts = [name for name in ours if name != "options" and theirs.get(name) != ours[name]]
    return ", ".join([*(f"option {name}" for name in names), *facts])


class TrainingState:
    """The parts of a training that change from step to step, saved and restored together.

    The state before the latest one is kept, in case the latest is damaged.

    Args:
        folder: the run's output folder.
        identity: what decides the results of the run, as JSON values: ``options`` and further facts by name. A state
            with another identity is refused.
        *parts: objects with ``state_dict`` and ``load_state_dict``: modules, optimizers, logs.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *parts: Any):
        self.path, self.previous = folder / STATE, folder / PREVIOUS_STATE
        self.identity, self.parts = identity, parts

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, atomically; the state before it becomes the previous one."""
        if self.path.is_file():
            os.replace(self.path, self.previous)
        parts = [part.state_dict() for part in self.parts]
        save_state(self.path, {"step": step, "identity": self.identity, "parts": parts})

    @contextmanager
    def saved_on_stop(self, step: int, stop: StopRequest) -> Iterator[None]:
        """Save the state of ``step`` steps if the next step fails after a request to stop.

        A scheduler sends its signal to all processes of a job, which ends the workers of a data loader.

        Raises:
            StoppedError: the step failed and the state is saved.
        """
        try:
            yield
        except RuntimeError as error:
            if not stop.signum or stop.accelerator.num_processes > 1:
                raise
            self.save(step)
            raise StoppedError(stop.signum, step) from error

    def restore(self, steps: int, report: Callable[[str], None] = print) -> int:
        """Load a state in place, if there is one, and return the step to continue from.

        Args:
            steps: optimizer steps of the whole training.
            report: receives a message about a damaged state.

        Raises:
            ValueError: all states are damaged, or they belong to another run.
        """
        damage = ""
        for path in (self.path, self.previous):
            if not path.is_file():
                continue
            try:
                return self._restore(path, steps)
            except _DamagedStateError as error:
                damage = f"{error}; "
                report(f"warning: {error}; trying the state before it")
        if damage:
            raise ValueError(f"{damage}pass --resume never to start from the beginning, or choose another --output")
        return 0

    def _restore(self, path: Path, steps: int) -> int:
        try:
            state = load_state(path)
            step, identity, values = state["step"], state["identity"], state["parts"]
        except (ValueError, KeyError) as error:
            raise _DamagedStateError(str(error)) from error
        differing = _differences(identity, self.identity)
        if differing:
            raise ValueError(
                f"{path} belongs to a run with another {differing}; undo the change, pass --resume never to start from "
                "the beginning, or choose another --output"
            )
        if not isinstance(step, int) or not 0 <= step <= steps:
            raise _DamagedStateError(f"{path} is after step {step!r} of {steps}")
        try:
            for part, value in zip(self.parts, values, strict=True):
                part.load_state_dict(value)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise _DamagedStateError(f"{path} does not fit this run ({str(error).partition(chr(10))[0]})") from error
        return step

    def discard(self) -> None:
        """Remove the states of a run that has finished, and partial files of a killed one."""
        for leftover in (self.path, self.previous, *leftovers(self.path)):
            leftover.unlink(missing_ok=True)


class _DamagedStateError(ValueError):
    """A state that cannot be used, while the one before it may be."""
