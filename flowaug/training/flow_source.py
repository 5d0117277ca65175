"""The flow of a fine-tuning: the one named, the data set's bundled one, or one trained first; and its settings."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowaug.flows.checkpoint import flow_digest, list_pretrained, read_config
from flowaug.mixup.settings import MIXUP_DEFAULTS, has_few_images
from flowaug.mixup.transform import FlowMixupTransform
from flowaug.training.dry_run import copies_memory
from flowaug.training.logs import order_warning
from flowaug.training.options import DataOptions, FinetuneOptions, TrainFlowOptions
from flowaug.training.options.recipes import resolve_options
from flowaug.training.resume import FINISHED, FolderInUseError, wait_until_free
from flowaug.training.train_flow import train_flow


def named_flow(options: FinetuneOptions) -> str | None:
    """Return the flow that ``--flow-aug`` names or the data set's bundled flow; None if one is to be trained."""
    if options.flow_aug.flow_aug != "auto":
        return options.flow_aug.flow_aug
    data = options.data
    whole = data.images_per_class is None and data.class_map is None
    return data.dataset if data.dataset in list_pretrained() and whole else None


def own_flow_options(options: FinetuneOptions, dataset) -> TrainFlowOptions:
    """Return the options to train the data set's own flow; its folder is named after data and options."""
    given = {item.name: getattr(options.data, item.name) for item in dataclasses.fields(DataOptions)}
    given |= {"recipe": options.recipe.recipe, "quick": options.recipe.quick}
    flow_options = resolve_options(TrainFlowOptions, {k: v for k, v in given.items() if v is not None})
    identity = {"data": dataset.fingerprint(), "recipe": flow_options.training_options()}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    run = dataclasses.replace(flow_options.run, output=options.run.output.parent / "flows" / f"{dataset.name}-{key}")
    return dataclasses.replace(flow_options, run=run)


def digest_of_flow(options: FinetuneOptions, dataset) -> str | None:
    """Return the digest of the flow to use; None without one, and for a flow that is still to be trained."""
    if not options.flow_aug.flow_aug:
        return None
    source = named_flow(options) or own_flow_options(options, dataset).run.output
    return flow_digest(source) if named_flow(options) or (Path(source) / FINISHED).is_file() else None


def find_flow(options: FinetuneOptions, dataset, accelerator: Accelerator) -> str | Path:
    """Return the flow to use: the one named, the data set's bundled one, or one trained now and kept."""
    if source := named_flow(options):
        return source
    flow_options = own_flow_options(options, dataset)
    folder = flow_options.run.output
    if not (folder / FINISHED).is_file():
        accelerator.print(f"there is no flow for this data set yet; training one first, kept in {folder}")
        if _train_alone(flow_options, accelerator):
            return folder
    accelerator.print(f"using the flow trained for this data set earlier: {folder}")
    return folder


def _train_alone(options: TrainFlowOptions, accelerator: Accelerator) -> bool:
    """Train a flow, or wait while another run trains it; return whether it was trained here."""
    folder = options.run.output
    while not (folder / FINISHED).is_file():
        try:
            train_flow(options, accelerator)
            return True
        except FolderInUseError:
            accelerator.print(f"another run is training this flow; waiting for it: {folder}")
            wait_until_free(folder, accelerator.is_main_process)
    return False


def mixup_keywords(options: FinetuneOptions, stored: dict[str, Any], images: int, num_classes: int) -> dict[str, Any]:
    """Return the settings of flow mixup: those given, else those stored with the flow, else by the number of images.

    Args:
        options: options.
        stored: settings in the flow's ``config.json``.
        images: number of training images.
        num_classes: number of classes.
    """
    keywords = MIXUP_DEFAULTS | stored | options.flow_aug.keywords()
    if keywords["per_axis"] is None:
        keywords["per_axis"] = has_few_images(images, num_classes)
    return keywords


def describe_flow(options: FinetuneOptions, dataset) -> str:
    """Return what ``--flow-aug`` stands for, for the plan."""
    if not options.flow_aug.flow_aug:
        return "none"
    stored: dict[str, Any] = {}
    if source := named_flow(options):
        config = read_config(source)
        stored = config.get("mixup", {})
        text, shape = f"{source}, {config['architecture']}", tuple(config["event_shape"])
    else:
        flow = own_flow_options(options, dataset)
        text, shape = f"{flow.run.output}", (dataset.channels, flow.flow.image_size, flow.flow.image_size)
        if not (flow.run.output / FINISHED).is_file():
            text += f", trained first: {flow.flow.model}, at most {flow.training.steps} steps"
    mixing = mixup_keywords(options, stored, len(dataset), len(dataset.class_names))
    weights = "principal component" if mixing["per_axis"] else "image"
    text += f", images {shape}; p = {mixing['p']:g}, alpha = {mixing['alpha']:g}, one weight per {weights}"
    return text + copies_memory(options.flow_aug.flow_aug_copies, len(dataset), shape)


def load_flow_mixup(options: FinetuneOptions, dataset, accelerator: Accelerator) -> FlowMixupTransform | None:
    """Return the flow augmentation that ``--flow-aug`` asks for, or None."""
    if not options.flow_aug.flow_aug:
        return None
    copies = options.flow_aug.flow_aug_copies
    if text := order_warning(options.transforms.aa, copies, options.streamed):
        accelerator.print(text)
    source = find_flow(options, dataset, accelerator)
    stored = read_config(source).get("mixup", {})
    return FlowMixupTransform.from_pretrained(
        source,
        accelerator.device,
        **mixup_keywords(options, stored, len(dataset), len(dataset.class_names)),
        class_names=dataset.class_names,
        seed=options.training.seed,
        process_index=accelerator.process_index,
    )
