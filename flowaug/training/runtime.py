"""The surroundings of a training: processes and devices, experiment trackers, the machine, and how a command ends."""

import contextlib
import ctypes
import io
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import AutocastKwargs, gather_object
from torch import Tensor, distributed, nn

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)
_KEEP_BYTES = 2**30
STEPS_BETWEEN_AGREEMENTS = 20  # of several processes about a stop request; an agreement waits for the device
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


def requested_precision(accelerator: Accelerator) -> str:
    """Return the mixed precision of an accelerator, or else of Accelerate's configuration: "no", "bf16", "fp16", ..."""
    if accelerator.mixed_precision != "no":
        return accelerator.mixed_precision
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def prepare_in_float32(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Prepare a model for training on the accelerator's processes, without its mixed precision."""
    settings = cast(Any, accelerator)
    handler, settings.autocast_handler = settings.autocast_handler, AutocastKwargs(enabled=False)
    try:
        return settings.prepare_model(model)
    finally:
        settings.autocast_handler = handler


def start_tracking(accelerator: Accelerator, project: str, options: dict) -> Callable[[dict, int], None]:
    """Start the tracker, if there is one, and return a function that logs (values, step)."""
    if accelerator.log_with:
        plain = (int, float, str, bool)
        accelerator.init_trackers(project, {k: v if isinstance(v, plain) else str(v) for k, v in options.items()})
    return lambda values, step: accelerator.log(values, step=step)


def sum_over_processes(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """Return a function that sums a tensor over the processes."""
    return lambda tensor: cast(Tensor, accelerator.reduce(tensor))


class StoppedError(Exception):
    """The end of a training that was asked to stop; its state is saved.

    Args:
        signum: the signal.
        step: steps done.
    """

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}; run the same command again to resume")
        self.exit_code = 128 + signum


class StopRequest:
    """SIGTERM and SIGINT as a request to stop after the current step; a second signal ends the program at once.

    Args:
        accelerator: processes, which stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signum = accelerator, 0
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the signal handlers, in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        self.handlers = {}

    def _receive(self, signum: int, frame: object) -> None:
        self.signum = signum
        self.__exit__()

    def after_step(self, done: int) -> int:
        """Return the signal to stop for after ``done`` steps, the same on all processes; 0 to continue."""
        if self.accelerator.num_processes == 1:
            return self.signum
        if done % STEPS_BETWEEN_AGREEMENTS:
            return 0
        received = torch.tensor(self.signum, device=self.accelerator.device)
        return int(sum_over_processes(self.accelerator)(received)) and (self.signum or signal.SIGTERM)


def any_process(value: bool) -> bool:
    """Return whether the value is true on any process."""
    initialised = distributed.is_available() and distributed.is_initialized()
    return any(gather_object([value])) if initialised else value


def compare_processes(value: Any, what: str) -> None:
    """Raise a ValueError unless all processes have the same value.

    Args:
        value: a JSON value.
        what: its name in the message.
    """
    values = gather_object([value])
    if any(other != values[0] for other in values):
        raise ValueError(
            f"the processes have different {what}: {values}; --output and the data must be on a file system that all "
            "processes share"
        )


@contextlib.contextmanager
def one_sentence_errors(prog: str) -> Iterator[None]:
    """End the program with "prog: message" and exit code 1 on an error that a user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # or a name that is not UTF-8 would end the program
    try:
        yield
    except StoppedError as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (ValueError, OSError) as error:
        sys.exit(f"{prog}: {error}")
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        sys.exit(f"{prog}: another process of this run ended or cannot be reached; see its message ({_first(error)})")


def _is_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _first(error: Exception) -> str:
    """Return the first line of a message."""
    return str(error).partition("\n")[0]


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
