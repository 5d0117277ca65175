"""The Accelerator of a script, with mixed precision and an experiment tracker if they are asked for."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers


def create_accelerator(args) -> Accelerator:
    """An Accelerator for the options ``cpu, log_with, output`` and, where there is one, ``amp``.

    Raises:
        ValueError: an unknown tracker, or one whose package is missing.
    """
    tracker = args.log_with
    known, usable = sorted(LOGGER_TYPE_TO_CLASS), {str(name) for name in get_available_trackers()}
    if tracker is not None and tracker not in known:
        raise ValueError(f"Accelerate has no tracker {tracker!r}; it has {', '.join(known)}")
    if tracker is not None and tracker not in usable:
        raise ValueError(f"--log-with {tracker} needs its package; pip install {tracker}, or leave the option out")
    precision = getattr(args, "amp", None) or "no"
    return Accelerator(cpu=args.cpu, mixed_precision=precision, log_with=tracker, project_dir=str(args.output))


def start_tracking(accelerator: Accelerator, project: str, recipe: dict) -> Callable[[dict, int], None]:
    """Open the tracker, if there is one, with the options as its configuration; returns what logs (values, step)."""
    if accelerator.log_with:
        plain = (int, float, str, bool)
        accelerator.init_trackers(project, {k: v if isinstance(v, plain) else str(v) for k, v in recipe.items()})
    return lambda values, step: accelerator.log(values, step=step)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)
_KEEP = 2**30
CPUINFO = Path("/proc/cpuinfo")


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next step instead of giving it back to the system.

    A training step on a CPU frees gigabytes of activations that the next step asks for again; getting them back page
    by page takes a good part of the step. Linux with glibc only; elsewhere nothing happens.

    Returns:
        Whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _KEEP) and mallopt(_TRIM_THRESHOLD, _KEEP))


def machine_name() -> str:
    """Processor and number of its cores, for reports: "AMD EPYC, 2 cores"; with AMX if it multiplies tiles."""
    lines = _cpuinfo()
    name = lines.get("model name") or platform.processor() or platform.machine()
    amx = " with AMX" if "amx_bf16" in lines.get("flags", "").split() else ""
    return f"{name}{amx}, {os.cpu_count()} cores"


def _cpuinfo() -> dict[str, str]:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
