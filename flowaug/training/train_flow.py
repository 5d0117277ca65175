"""Train a conditional normalizing flow for flow augmentation.

    python train_flow.py                                    # embedded digits, about two minutes on a laptop
    python train_flow.py --dataset fashion_mnist --output runs/fashion
    accelerate launch train_flow.py --data-dir photos/ --output runs/photos

The schedule is that of NFPI (Enescu & Sahbi): initialise on data, warm up under one unit Gaussian, solve once for the
class Gaussians by fixed-point iteration, then train to them by likelihood. Options left out come from the data set's
recipe.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from flowaug import create_flow
from flowaug.data.wds.dataset import StreamDataset, count_skipped
from flowaug.data.wds.index import is_shards
from flowaug.evaluation.oracle import Oracle, load_teacher
from flowaug.evaluation.pictures import draw_progress
from flowaug.flows.passes import AveragedFlow, ImageTable, evaluate, fit_pca, reduced
from flowaug.latents.moments import ClassMoments
from flowaug.training.dry_run import flow_plan
from flowaug.training.flow_batches import augment, crops, inherited_options, start_from, training_batches
from flowaug.training.flow_folder import write_flow_folder
from flowaug.training.gaussian_schedule import (
    ESTIMATOR_DEFAULTS,
    GaussianSchedule,
    check_estimator_options,
    check_gaussian_options,
    settle_gaussian_options,
)
from flowaug.training.logs import MetricsLog
from flowaug.training.optimizers import flow_optimizer
from flowaug.training.options import flow_parser
from flowaug.training.recipes import deciding_options, load_split, parse_with_recipe
from flowaug.training.resume import Run, sole_writer
from flowaug.training.runtime import create_accelerator, keep_freed_memory, start_tracking

INIT_BATCH = 512
ANNEAL_SHARE = 0.4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out come from the recipe."""
    args = parse_with_recipe(flow_parser(__doc__), argv, "flow", settle_recipe)
    check_gaussian_options(args)
    return args


def settle_recipe(given: argparse.Namespace, recipe: dict) -> dict:
    """What the recipe comes to beside the options given: --init-from and --estimator decide some of it."""
    check_estimator_options(given)
    return recipe | ESTIMATOR_DEFAULTS.get(given.estimator, {}) | inherited_options(given)


def recipe_of(args: argparse.Namespace) -> dict:
    """The options that decide the numbers of the trained flow."""
    skip = ("eval_every", "recompute")
    ordered = crops(args) and is_shards(args.dataset, args.data_dir)  # a stream comes in an order of its workers
    return deciding_options(args, skip if ordered else (*skip, "workers"))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then as --lr-schedule says: the averaged weights settle while it falls."""
    warm = min(1.0, (step + 1) / max(args.warmup_steps, 1))
    if args.lr_schedule == "halving":
        return args.lr * warm * 0.5 ** (3 * step // args.steps)
    return args.lr * min(warm, (args.steps - step) / ((args.anneal_share or ANNEAL_SHARE) * args.steps))


def load_sets(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """Open both splits and settle the number of steps."""
    sets = {split: load_split(args, split) for split in ("train", "val")}
    if args.estimator == "glem" and crops(args) and isinstance(sets["train"], StreamDataset):
        raise ValueError("--estimator glem takes images by place, which shards cannot give timm's crops; leave one out")
    per_epoch = max(1, len(sets["train"]) // (args.batch_size * accelerator.num_processes))
    args.steps = min(args.steps, args.max_epochs * per_epoch)
    check_schedule(args)
    return sets


def check_schedule(args: argparse.Namespace) -> None:
    """Raise a ValueError for options about the course of the training that cannot be."""
    if args.swa_from is not None and args.swa_from >= args.steps:
        raise ValueError(f"--swa-from {args.swa_from} is never reached in {args.steps} steps; choose an earlier step")
    if args.anneal_share is not None and args.lr_schedule != "linear":
        raise ValueError(f"--lr-schedule {args.lr_schedule} has no --anneal-share; leave one of them out")
    if args.anneal_share is not None and not 0 < args.anneal_share <= 1:
        raise ValueError(f"--anneal-share is {args.anneal_share}; expected more than 0 and at most 1")


def load_tables(args: argparse.Namespace, sets: dict, accelerator: Accelerator) -> list[ImageTable]:
    """Read both splits into memory at the size of the flow."""
    size, place = (args.image_size, args.image_size), (accelerator.process_index, accelerator.num_processes)
    train = sets["train"]
    return [
        ImageTable(*data.read_table(size, train.channels), len(train.class_names), 256, *place)
        for data in sets.values()
    ]


def initialise(flow, table: ImageTable, args: argparse.Namespace) -> None:
    """Data-dependent initialisation on the same images on every process."""
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(table), generator=generator)[:INIT_BATCH]
    flow.initialise(flow.dequantise(augment(table.images[chosen], args, generator), generator))


def create(args: argparse.Namespace, dataset):
    """A flow of the recipe's architecture."""
    flow = create_flow(
        args.model,
        event_shape=(dataset.channels, args.image_size, args.image_size),
        num_classes=len(dataset.class_names),
        grey_levels=2**args.bits if args.bits else dataset.grey_levels,
        seed=args.seed,
        **({"coupling": args.coupling} if args.coupling else {}),
        **args.model_kwargs,
    )
    flow.class_names = dataset.class_names
    return flow


def begin(flow, table: ImageTable, args: argparse.Namespace) -> None:
    """Set the flow's parameters to those of --init-from, or by the data."""
    if args.init_from:
        start_from(flow, args.init_from)
    else:
        initialise(flow, table, args)


class Training:
    """A flow in training: what changes from step to step, and the steps.

    Args:
        args: settled options.
        accelerator: devices and processes.
        flow: the flow at its start.
        table: the training images.
        val: the images that it is judged by.
        teachers: whose soft labels the posterior learns, in turns if several; none for the labels themselves.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        flow,
        table: ImageTable,
        val: ImageTable,
        teachers: Sequence[Oracle],
    ):
        self.args, self.accelerator, self.table, self.val = args, accelerator, table, val
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.flow, self.teachers = flow.to(self.device), [teacher.to(self.device) for teacher in teachers]
        self.averaged = AveragedFlow(flow, args.ema_decay, args.swa_from)
        self.dtype = getattr(torch, args.conditioner_dtype)
        flow.set_training_form(self.dtype, args.recompute, args.torchcompile)
        self.optimizer = flow_optimizer(flow, args.opt, args.lr)
        self.log = MetricsLog(args.output, self.main, start_tracking(accelerator, "train_flow", recipe_of(args)))
        self.schedule = GaussianSchedule(args, table, accelerator.reduce, flow)
        parts = (flow, self.averaged, self.optimizer, self.log, self.schedule)
        self.state = Run(args.output, recipe_of(args), *parts)
        self.start = self.state.restore() if args.resume == "auto" else 0
        self.model, self.generator = accelerator.prepare(flow), torch.Generator(self.device)
        self.began = time.time()

    def run(self, dataset) -> None:
        """Take all steps that are left."""
        if self.start == 0:
            self.set_gaussians(0)
        batches = training_batches(self.schedule.phases(), dataset, self.table, self.args, self.start)
        steps, hidden = self.args.steps, not self.main
        with tqdm(total=steps, initial=self.start, unit="step", disable=hidden, dynamic_ncols=True) as bar:
            for step, batch in enumerate(batches, self.start):
                loss = self.take_step(step, *batch)
                self.set_gaussians(step + 1)
                self.look(step + 1, loss, bar)
                bar.update()

    def take_step(self, step: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Change the weights once; returns the loss."""
        self.generator.manual_seed((self.args.seed << 40) + (step << 12) + self.accelerator.process_index)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.args)
        x, y = augment(x.to(self.device), self.args, self.generator), y.to(self.device)
        soft = self.soft_labels(step, x)
        x = self.flow.dequantise(x, self.generator)
        loss = self.flow.bits_per_dim(self.model(x, y, self.args.posterior_weight, soft)).mean()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averaged.update(self.flow, step=step)
        return loss

    def soft_labels(self, step: int, x: torch.Tensor) -> torch.Tensor | None:
        """What a teacher says of images (B, C, H, W) in [0, 1]: probabilities (B, K); None without a teacher.

        Several take turns: the loss is linear in what they say, so its mean over them is that of their mean.
        """
        if not self.teachers:
            return None
        teacher = self.teachers[step % len(self.teachers)]
        return teacher.probabilities(x, bool(self.args.hflip), self.dtype)

    def set_gaussians(self, done: int) -> None:
        """Set the class Gaussians, of the averaged flow too, if they are due after ``done`` steps."""
        if note := self.schedule.after(done, self.flow):
            self.log.note("class_gaussians", note)
            self.averaged.module.gaussians.load_state_dict(self.flow.gaussians.state_dict())

    def look(self, done: int, loss: torch.Tensor, bar: tqdm) -> None:
        """Judge, draw and save after ``done`` steps, where it is time to."""
        last = done == self.args.steps
        if done % self.args.eval_every == 0 or last:
            values = evaluate(self.averaged.module, self.val, self.device, self.accelerator.reduce)
            self.log.write(done, {"train_loss": loss.item(), **values}, bar)
            if self.main and not last:
                draw_progress(self.averaged.module, self.table, self.val, self.args.output)
        if done % self.args.save_every == 0 and self.main:
            self.state.save(done)

    def finish(self, dataset) -> None:
        """Fit moments and class axes to the averaged flow and write its folder."""
        args, table, reduce = self.args, self.table, self.accelerator.reduce
        final = self.averaged.module.eval()
        moments = ClassMoments.zeros(table.num_classes, final.dim, self.device)
        pca = fit_pca(final, table, self.device, args.rank, args.partners_per_class, reduce, moments)
        moments = reduced(moments, reduce)
        self.log.note("train_seconds", round(time.time() - self.began, 1))
        if self.main:
            recipe = recipe_of(args)
            write_flow_folder(args.output, final, pca, moments, dataset, table, self.val, recipe, self.log)
            self.state.discard()
        self.accelerator.wait_for_everyone()


def train(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """Train a flow and write its folder; returns the folder."""
    sets = load_sets(args, accelerator)
    settle_gaussian_options(args)
    flow = create(args, sets["train"])
    if args.dry_run:
        accelerator.print(flow_plan(args, flow, sets["train"], len(sets["val"]), accelerator))
        return args.output
    teachers = [load_teacher(name, sets["train"]) for name in args.teacher or ()]
    with sole_writer(args.output, accelerator.is_main_process):
        table, val = load_tables(args, sets, accelerator)
        begin(flow, table, args)
        training = Training(args, accelerator, flow, table, val, teachers)
        training.run(sets["train"])
        if skipped := count_skipped(sets):
            training.log.note("skipped", skipped)
        training.finish(sets["train"])
    return args.output


def main(argv: list[str] | None = None) -> None:
    """Command line: one sentence and exit code 1 on failure."""
    try:
        args = parse_args(argv)
        keep_freed_memory()
        accelerator = create_accelerator(args)
        folder = train(args, accelerator)
        if not args.dry_run:
            accelerator.print(f"flow written to {folder}; next: python finetune.py --flow-aug {folder}")
        accelerator.end_training()
    except (ValueError, OSError) as error:
        sys.exit(f"train_flow.py: {error}")


if __name__ == "__main__":
    main()
