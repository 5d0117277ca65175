"""The surroundings of a training: processes and devices, experiment trackers, the machine, and how a command ends."""

import contextlib
import ctypes
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)
_KEEP_BYTES = 2**30
CPUINFO = Path("/proc/cpuinfo")


def create_accelerator(cpu: bool, log_with: str | None, output: Path, precision: str | None = None) -> Accelerator:
    """Create an Accelerator with an experiment tracker.

    Args:
        cpu: use the CPU even if there is a GPU.
        log_with: name of the tracker, or None.
        output: folder of the tracker's files.
        precision: "no", "bf16" or "fp16"; None for that of Accelerate's configuration.

    Raises:
        ValueError: an unknown tracker, or one whose package is not installed.
    """
    known, usable = sorted(LOGGER_TYPE_TO_CLASS), {str(name) for name in get_available_trackers()}
    if log_with is not None and log_with not in known:
        raise ValueError(f"--log-with is {log_with!r}; expected one of Accelerate's trackers: {', '.join(known)}")
    if log_with is not None and log_with not in usable:
        raise ValueError(f"--log-with {log_with} needs a package; pip install {log_with}, or leave the option out")
    return Accelerator(cpu=cpu, mixed_precision=precision, log_with=log_with, project_dir=str(output))


def start_tracking(accelerator: Accelerator, project: str, options: dict) -> Callable[[dict, int], None]:
    """Start the tracker, if there is one, and return a function that logs (values, step)."""
    if accelerator.log_with:
        plain = (int, float, str, bool)
        accelerator.init_trackers(project, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})
    return lambda values, step: accelerator.log(values, step=step)


def sum_over_processes(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """Return a function that sums a tensor over the processes."""
    return lambda tensor: cast(Tensor, accelerator.reduce(tensor))


@contextlib.contextmanager
def one_sentence_errors(prog: str) -> Iterator[None]:
    """End the program with "prog: message" and exit code 1 on an error that a user can mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: {error}")


def shell_command(*arguments: object) -> str:
    """Return a command line of ``flowaug`` that runs as it stands in the user's shell."""
    program = ["flowaug"] if shutil.which("flowaug") else [sys.executable, "-m", "flowaug"]
    return shlex.join([*program, *map(str, arguments)])


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    A training step on a CPU frees gigabytes of activations that the next step needs again; to get them back page by
    page takes a good part of the step. Linux with glibc only; elsewhere nothing happens.

    Returns:
        Whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _KEEP_BYTES) and mallopt(_TRIM_THRESHOLD, _KEEP_BYTES))


def machine_name() -> str:
    """Return processor and number of cores for reports, as "AMD EPYC, 2 cores", with AMX if it has that."""
    facts = _read_cpuinfo()
    name = facts.get("model name") or platform.processor() or platform.machine()
    amx = " with AMX" if "amx_bf16" in facts.get("flags", "").split() else ""
    return f"{name}{amx}, {os.cpu_count()} cores"


def _read_cpuinfo() -> dict[str, str]:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
