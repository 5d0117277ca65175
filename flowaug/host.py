"""What a training script asks of the machine."""

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)
_KEEP = 2**30


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
