"""Start a flow from a trained one, for other data of the same shape: ``train_flow.py --init-from``."""

import argparse

from flowaug.checkpoint import load_flow, read_config
from flowaug.flow import Flow


def inherited_options(given: argparse.Namespace) -> dict:
    """Options that the flow of ``--init-from`` decides: architecture and image size; nothing without one.

    Its latents are ready, so the class Gaussians are solved for before the first step unless ``--solve-at`` is given.

    Raises:
        ValueError: options that the trained flow decides were given as well.
        FileNotFoundError: no such flow.
    """
    if not given.init_from:
        return {}
    config = read_config(given.init_from)
    twice = [name for name in ("model", "coupling", "image_size", "model_kwargs") if getattr(given, name)]
    if twice:
        names = ", ".join("--" + name.replace("_", "-") for name in twice)
        raise ValueError(f"--init-from {given.init_from} decides {names}; leave them out")
    kwargs = dict(config["overrides"])
    decided = {"model": config["architecture"], "image_size": config["event_shape"][-1]}
    decided |= {"coupling": kwargs.pop("coupling", None), "model_kwargs": kwargs}
    return decided | ({"solve_at": 0} if given.estimator in ("fpi", "gradient", "data") else {})


def start_from(flow: Flow, source: str) -> None:
    """Copy the bijection of a trained flow into ``flow``, in place; the class Gaussians stay as they are.

    Raises:
        ValueError: the images have another shape than the trained flow's.
    """
    trained = load_flow(source)
    if trained.event_shape != flow.event_shape:
        raise ValueError(
            f"the flow at {source!r} takes images of shape {trained.event_shape}, the data have {flow.event_shape}; "
            "start from a flow of the same channels"
        )
    flow.bijection.load_state_dict(trained.bijection.state_dict())
