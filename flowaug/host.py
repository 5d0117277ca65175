"""What a script asks of the machine."""

import ctypes
import os
import platform
import sys
from pathlib import Path

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
