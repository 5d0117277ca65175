"""Fine-tune a timm model, with or without flow augmentation.

    python finetune.py --flow-aug                           # embedded digits and their bundled flow, under a minute
    python finetune.py --data-dir photos/ --flow-aug        # trains a flow first and keeps it
    accelerate launch finetune.py --model eva02_base_patch14_448 --data-dir photos/ --flow-aug runs/flow

Options left out come from the recipe of the data set. Labels stay hard and the loss stays as it is.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from flowaug import FlowMixupTransform, list_pretrained
from flowaug.data.loaders import endless_batches
from flowaug.data.transforms import eval_transform
from flowaug.data.wds.dataset import count_skipped
from flowaug.data.wds.index import is_shards
from flowaug.evaluation.pictures import draw_augmented
from flowaug.evaluation.real_labels import RealLabels
from flowaug.flows.checkpoint import CONFIG, read_config
from flowaug.training import train_flow
from flowaug.training.classifier import (
    accuracy,
    count_steps,
    create_classifier,
    create_loss,
    create_optimizer,
    create_schedule,
    evaluation_steps,
    write_classifier,
)
from flowaug.training.dry_run import classifier_plan, copies_memory
from flowaug.training.logs import MetricsLog, RunningMean, describe_order, describe_results, describe_weights
from flowaug.training.options import check_disagreements, classifier_parser, settle_weights
from flowaug.training.pipeline import create_copies, create_loaders, create_pipeline, memory_format
from flowaug.training.recipes import deciding_options, given_data_options, load_split, parse_with_recipe
from flowaug.training.resume import Run, sole_writer
from flowaug.training.runtime import create_accelerator, keep_freed_memory, start_tracking


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out come from the recipe."""
    return parse_with_recipe(classifier_parser(__doc__), argv, "classifier", settle_recipe)


def settle_recipe(given: argparse.Namespace, recipe: dict) -> dict:
    """What the recipe comes to beside the options given: another length or model takes some of it back."""
    check_disagreements(given, recipe)
    taken = {"epochs", "steps"} if given.epochs or given.steps else set()
    if given.model and given.model != recipe["model"]:
        taken |= {"img_size", "pretrained", "model_kwargs"}
    return {name: value for name, value in recipe.items() if name not in taken}


def find_flow(args: argparse.Namespace, dataset, accelerator: Accelerator) -> str | Path:
    """The flow to use: the one named, the data set's bundled one, or one trained now and kept beside the outputs."""
    if source := named_flow(args):
        return source
    options = flow_options(args, dataset)
    if (options.output / CONFIG).is_file():
        accelerator.print(f"using the flow trained for this data earlier: {options.output}")
        return options.output
    accelerator.print(f"no flow for this data yet: training one first, kept in {options.output}")
    return train_flow.train(options, accelerator)


def named_flow(args: argparse.Namespace) -> str | None:
    """The flow that --flow-aug names or the data set's bundled one; None if one is to be trained."""
    if args.flow_aug != "auto":
        return args.flow_aug
    whole = args.images_per_class is None and args.class_map is None
    return args.dataset if args.dataset in list_pretrained() and whole else None


def flow_options(args: argparse.Namespace, dataset) -> argparse.Namespace:
    """Options of ``train_flow.py`` for the data set's own flow; its folder is named after data and options."""
    recipe = [*(["--recipe", str(args.recipe)] if args.recipe else []), *(["--quick"] if args.quick else [])]
    options = train_flow.parse_args([*given_data_options(args), *recipe])
    identity = {"data": dataset.fingerprint(), "recipe": train_flow.recipe_of(options)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    options.output = args.output.parent / "flows" / f"{dataset.name}-{key}"
    return options


def describe_flow(args: argparse.Namespace, dataset) -> str:
    """What --flow-aug comes to, for --dry-run."""
    if not args.flow_aug:
        return "none"
    if source := named_flow(args):
        config = read_config(source)
        text, shape = f"{source}, {config['architecture']}", tuple(config["event_shape"])
    else:
        options = flow_options(args, dataset)
        text, shape = f"{options.output}", (dataset.channels, options.image_size, options.image_size)
        if not (options.output / CONFIG).is_file():
            text += f", trained first: {options.model}, {options.steps} steps at most"
    text += f", for images {shape}, {describe_weights(args)}"
    return text + copies_memory(args.flow_aug_copies, len(dataset), shape)


def load_flow_mixup(args: argparse.Namespace, dataset, accelerator: Accelerator) -> FlowMixupTransform | None:
    """The flow augmentation that --flow-aug asks for, or None."""
    if not args.flow_aug:
        return None
    if text := describe_order(args):
        accelerator.print(text)
    return FlowMixupTransform.from_pretrained(
        find_flow(args, dataset, accelerator),
        accelerator.device,
        p=args.flow_aug_p,
        alpha=args.flow_aug_alpha,
        partner=args.flow_aug_partner,
        rank=args.flow_aug_rank,
        per_axis=args.flow_aug_per_axis,
        rescaled=bool(args.flow_aug_rescaled),
        redraws=args.flow_aug_redraws or 0,
        policy=args.flow_aug_policy,
        class_names=dataset.class_names,
        seed=args.seed,
        process_index=accelerator.process_index,
    )


class Training:
    """A classifier in training: what changes from step to step, and the steps.

    Args:
        args: options.
        accelerator: devices and processes.
        model: the classifier at its start.
        pipeline: the way of a batch to it.
        loaders: of training and val images.
        flow_mixup: the flow augmentation, or None.
        real: ReaL labels of the val images, or None.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, model, pipeline, loaders, flow_mixup, real):
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline
        self.flow_mixup, self.real = flow_mixup, real
        self.device, self.main, self.loaders = accelerator.device, accelerator.is_main_process, loaders
        self.steps, self.per_epoch = count_steps(args, loaders[0])
        optimizer = create_optimizer(args, model)
        self.scheduler, self.criterion = create_schedule(args, optimizer, self.steps), create_loss(args)
        model = model.to(self.device, memory_format=memory_format(args))
        decay = args.model_ema_decay
        self.averaged = ModelEmaV3(model, decay=decay, use_warmup=True) if args.model_ema else None
        self.log = MetricsLog(args.output, self.main, start_tracking(accelerator, "finetune", recipe_of(args)))
        self.mean_loss = RunningMean(self.device)
        parts = (model, self.averaged, optimizer, accelerator.scaler, self.log, self.mean_loss, flow_mixup)
        self.state = Run(args.output, recipe_of(args), *(part for part in parts if part is not None))
        self.start = self.state.restore() if args.resume == "auto" else 0
        if args.torchcompile:
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.began = time.time()

    def run(self) -> None:
        """Take all steps that are left."""
        stream = endless_batches(self.loaders[0], self.start * self.args.grad_accum_steps)
        self.model.train()
        hidden = not self.main
        with tqdm(total=self.steps, initial=self.start, unit="step", disable=hidden, dynamic_ncols=True) as bar:
            for step in range(self.start, self.steps):
                self.take_step(step, stream)
                bar.update()
                self.look(step + 1, bar)

    def take_step(self, step: int, stream) -> None:
        """Change the weights once."""
        args, epoch = self.args, step // self.per_epoch
        self.scheduler.step(epoch * self.per_epoch if args.sched_on_epochs else step)
        batches = step_batches(args, self.accelerator, stream, self.pipeline, step, epoch)
        self.mean_loss.update(backward(args, self.accelerator, self.model, self.criterion, batches))
        self.accelerator.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averaged is not None:
            self.averaged.update(self.accelerator.unwrap_model(self.model), step=step)

    def look(self, done: int, bar: tqdm) -> None:
        """Judge and save after ``done`` steps, where it is time to."""
        if done % evaluation_steps(self.steps, self.per_epoch) == 0 or done == self.steps:
            judged = self.model if self.averaged is None else self.averaged.module
            values = accuracy(judged, self.loaders[1], self.pipeline, self.device, self.accelerator.reduce, self.real)
            self.log.write(done, {"train_loss": self.mean_loss.read(), **values}, bar)
        if done % self.args.save_every == 0 and self.main:
            self.state.save(done)

    def finish(self, dataset) -> dict:
        """Write weights, curves, the before/after grid and the summary; returns it."""
        args, seconds = self.args, time.time() - self.began
        if self.main:
            final = self.accelerator.unwrap_model(self.model) if self.averaged is None else self.averaged.module
            write_classifier(args.output, args, final, self.pipeline, dataset.class_names)
            self.log.plot(["train_loss", "top1"], f"{args.model} on {dataset.name}")
            if self.flow_mixup is not None:
                self.log.note("flow_aug", self.flow_mixup.counts)
                draw_before_after(self.flow_mixup, dataset, args.output / "augmented.png")
            self.state.discard()
        return self.log.finish(model=args.model, seconds=round(seconds, 1), steps=self.log.last["step"])


def finetune(args: argparse.Namespace, accelerator: Accelerator) -> dict | None:
    """Train, evaluate, write the folder; returns the summary (None after --dry-run)."""
    sets = [load_split(args, split) for split in ("train", "val")]
    num_classes, place = len(sets[0].class_names), (accelerator.process_index, accelerator.num_processes)
    real = RealLabels(args.real_labels, sets[1], *place) if args.real_labels else None
    settle_weights(args, len(sets[0]), num_classes)
    set_seed(args.seed)
    model, spec = create_classifier(args, num_classes, sets[0].channels)
    loaders = create_loaders(args, sets, spec[0], accelerator)
    if args.dry_run:
        steps, flow = count_steps(args, loaders[0])[0], describe_flow(args, sets[0])
        return accelerator.print(classifier_plan(args, model, spec[0], sets, steps, flow, accelerator))
    flow_mixup = load_flow_mixup(args, sets[0], accelerator)
    with sole_writer(args.output, accelerator.is_main_process):
        if args.flow_aug_copies:
            sets[0] = create_copies(args, sets[0], flow_mixup, spec[0], *place, accelerator.reduce)
            loaders = create_loaders(args, sets, spec[0], accelerator)
        on_batches = None if args.flow_aug_copies else flow_mixup
        pipeline = create_pipeline(args, spec, on_batches, num_classes, accelerator.device)
        training = Training(args, accelerator, model, pipeline, loaders, flow_mixup, real)
        training.run()
        if skipped := count_skipped({"train": sets[0], "val": sets[1]}, gather_object):
            training.log.note("skipped", skipped)
        return training.finish(sets[1])


def step_batches(args: argparse.Namespace, accelerator: Accelerator, stream, pipeline, step: int, epoch: int):
    """The augmented batches of one step; what is random in each depends on its number alone."""
    for part in range(args.grad_accum_steps):
        seed_step(args.seed, step, part, accelerator.process_index, pipeline.flow_mixup)
        x, y = pipeline.train(*(tensor.to(accelerator.device) for tensor in next(stream)), epoch)
        yield x.contiguous(memory_format=memory_format(args)), y


def backward(args: argparse.Namespace, accelerator: Accelerator, model, criterion, batches) -> torch.Tensor:
    """Add up the gradients of a step, exchanged between processes in its last pass only; returns its mean loss."""
    losses = []
    for part, (x, y) in enumerate(batches, 1):
        with contextlib.nullcontext() if part == args.grad_accum_steps else accelerator.no_sync(model):
            losses.append(criterion(model(x), y))
            accelerator.backward(losses[-1] / args.grad_accum_steps)
    return torch.stack([loss.detach() for loss in losses]).mean()


def seed_step(seed: int, step: int, part: int, rank: int, flow_mixup: FlowMixupTransform | None) -> None:
    """Make what is random in a forward pass depend on its number alone, so that a resumed run repeats it."""
    numbers = (rank, step) if part == 0 else (rank, step, part)
    set_seed(int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0]))
    if flow_mixup is not None:
        flow_mixup.reseed(seed, *numbers)


def recipe_of(args: argparse.Namespace) -> dict:
    """The options that decide the numbers of the classifier."""
    ordered = is_shards(args.dataset, args.data_dir)  # a stream comes in an order of its workers
    return deciding_options(args, () if ordered else ("workers",))


def draw_before_after(flow_mixup: FlowMixupTransform, dataset, path: Path) -> None:
    """Draw one image per class, before and after, at the data set's own size."""
    images, labels = zip(*dataset.examples(), strict=True)
    transform = eval_transform(max(dataset.image_size))
    draw_augmented(flow_mixup, torch.stack([transform(image) for image in images]), torch.tensor(labels), path)


def main(argv: list[str] | None = None) -> None:
    """Command line: one sentence and exit code 1 on failure."""
    try:
        args = parse_args(argv)
        keep_freed_memory()
        accelerator = create_accelerator(args)
        summary = finetune(args, accelerator)
        if summary is None:
            return
        accelerator.print(describe_results(args, summary))
        accelerator.end_training()
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: {error}")


if __name__ == "__main__":
    main()
