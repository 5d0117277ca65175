"""The Accelerator of a script, with mixed precision and an experiment tracker if they are asked for."""

from collections.abc import Callable

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
