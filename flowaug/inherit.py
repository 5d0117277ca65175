"""Start a flow from a trained one, for other data of the same shape: ``train_flow.py --init-from``."""

import argparse

from flowaug.checkpoint import load_flow, read_config
from flowaug.flow import Flow


def settle_init_from(args: argparse.Namespace) -> None:
    """Take architecture and image size from the flow of ``--init-from``, in place; without one nothing is done.

    Its latents are ready, so the class Gaussians are solved for before the first step unless ``--solve-at`` is given.

    Raises:
        ValueError: options that the trained flow decides were given as well.
        FileNotFoundError: no such flow.
    """
    if not args.init_from:
        return
    config = read_config(args.init_from)
    given = [name for name in ("model", "coupling", "image_size", "model_kwargs") if getattr(args, name)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"--init-from {args.init_from} decides {names}; leave them out")
    args.model, args.image_size = config["architecture"], config["event_shape"][-1]
    args.model_kwargs = dict(config["overrides"])
    args.coupling = args.model_kwargs.pop("coupling", "")  # empty, not None: no recipe fills it in
    if args.solve_at is None and args.estimator in ("fpi", "gradient", "data"):
        args.solve_at = 0


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
