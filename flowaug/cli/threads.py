"""Threads of a command on a busy or a shared machine. Nothing heavy is imported here: OpenMP must not be loaded yet."""

import os
import sys
from pathlib import Path

SPIN_COUNT = 1000  # see benchmarks/BUSY_MACHINE.md
GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def set_up_threads() -> None:
    """Set the environment variables of OpenMP that the user has not set, before torch reads them.

    Threads that wait for each other spin only briefly: beside other busy processes, the thread that is waited for often
    has no core, and spinning keeps it from getting one. There are no more threads than the processor time that a
    container may use. Without effect once torch is imported.
    """
    if "torch" in sys.modules:
        return
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    quota = cpu_quota()
    if quota is not None and quota < available_cpus():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, round(quota))))


def available_cpus() -> int:
    """Return the number of CPUs on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return the CPUs' worth of time that the control groups of this process may use; None without a limit."""
    quotas = [quota for folder in _group_folders() if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _group_folders() -> list[Path]:
    """Return the folders of the control group of this process and of the groups that contain it (versions 1 and 2)."""
    folders = [GROUPS, GROUPS / "cpu"]
    for line in _read(OWN_GROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        root = GROUPS / "cpu" if "cpu" in controllers.split(",") else GROUPS
        if controllers == "" or root != GROUPS:
            own = Path(path).relative_to("/")
            folders += [root / part for part in (own, *own.parents)]
    return folders


def _read_quota(folder: Path) -> float | None:
    limits = _read(folder / "cpu.max").split()  # version 2
    if not limits:
        limits = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if not all(limit.isdecimal() for limit in limits):  # "max", -1, or no such files
        return None
    return int(limits[0]) / int(limits[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
