"""Train a conditional normalizing flow for flow augmentation.

    python train_flow.py                                    # embedded digits, about two minutes on a laptop
    python train_flow.py --dataset fashion_mnist --output runs/fashion
    accelerate launch train_flow.py --data-dir photos/ --output runs/photos

The schedule is that of NFPI (Enescu & Sahbi): initialise on data, warm up under one unit Gaussian, solve once for the
class Gaussians by fixed-point iteration, then train to them by likelihood. Options left out come from the data set's
recipe.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from flowaug import create_flow, list_flows
from flowaug.data import load_dataset, stack_images
from flowaug.fitting import ImageTable, evaluate, fit_pca, random_hflip, random_shift
from flowaug.host import keep_freed_memory
from flowaug.loaders import batches
from flowaug.recipes import add_data_options, deciding_options, fill_in, flow_recipe
from flowaug.report import MetricsLog, write_flow_folder
from flowaug.schedule import (
    ESTIMATOR_DEFAULTS,
    GaussianSchedule,
    add_gaussian_options,
    check_gaussian_options,
    settle_gaussian_options,
)
from flowaug.state import Run

INIT_BATCH = 512


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out are None until the recipe fills them in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = add_data_options(parser)
    data.add_argument("--image-size", type=int, help="height and width the flow works at")
    flow = parser.add_argument_group("flow")
    flow.add_argument("--model", help=f"architecture: {', '.join(list_flows())}")
    flow.add_argument("--coupling", choices=("additive", "affine", "matrix_exp"), help="coupling of the architecture")
    flow.add_argument("--rank", type=int, help="principal axes kept per class")
    add_gaussian_options(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help="optimiser steps")
    training.add_argument("--max-epochs", type=int, help="fewer steps where --steps would pass the data more often")
    training.add_argument("--batch-size", type=int, help="images per step and process")
    training.add_argument("--lr", type=float, help="peak learning rate of Adamax")
    training.add_argument("--warmup-steps", type=int, help="steps of linear learning-rate warm-up")
    training.add_argument("--ema-decay", type=float, default=0.998, help="decay of the averaged weights that are saved")
    training.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm")
    training.add_argument("--shift", type=int, help="random shift, pixels")
    training.add_argument("--hflip", type=float, help="probability of a mirror image")
    training.add_argument(
        "--conditioner-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: run the networks in half the bits; events, Gaussians and weights stay in float32",
    )
    training.add_argument(
        "--recompute",
        action="store_true",
        help="run the networks again in the backward pass: less memory, a third longer",
    )
    training.add_argument("--eval-every", type=int, default=500, help="steps between evaluations on the val split")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("runs/flow"), help="folder to write the flow to")
    run.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from a killed run in --output")
    run.add_argument("--save-every", type=int, default=1000, help="steps between states that a killed run resumes from")
    run.add_argument("--cpu", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or (None if args.data_dir else "digits")
    check_gaussian_options(args)
    fill_in(args, ESTIMATOR_DEFAULTS.get(args.estimator, {}))
    fill_in(args, flow_recipe(args.dataset))
    return args


def recipe_of(args: argparse.Namespace) -> dict:
    """The options that decide the numbers of the trained flow."""
    return deciding_options(args, skip=("output", "resume", "save_every", "cpu", "eval_every", "recompute"))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then linear decay to zero over the last 40 %: the average weights settle."""
    warm = (step + 1) / max(args.warmup_steps, 1)
    return args.lr * min(1.0, warm, (args.steps - step) / (0.4 * args.steps))


def load_tables(args: argparse.Namespace, accelerator: Accelerator):
    """Read both splits into memory at the size of the flow."""
    train = load_dataset(args.dataset, args.data_dir, "train", args.images_per_class, args.subset_seed)
    val = load_dataset(args.dataset, args.data_dir, "val")
    size, place = (args.image_size, args.image_size), (accelerator.process_index, accelerator.num_processes)
    tables = [
        ImageTable(
            stack_images(d, size, train.channels), torch.as_tensor(d.targets), len(train.class_names), 256, *place
        )
        for d in (train, val)
    ]
    args.steps = min(args.steps, args.max_epochs * max(1, len(train) // (args.batch_size * place[1])))
    return train, *tables


def training_batches(phases: list[tuple[ImageTable, int]], args: argparse.Namespace, start: int):
    """Batches of every phase (images, steps) in turn, epoch by epoch, from step ``start`` on."""
    for table, steps in phases:
        yield from itertools.islice(every_epoch(table, args), min(start, steps), steps)
        start = max(0, start - steps)


def every_epoch(table: ImageTable, args: argparse.Namespace):
    """Shuffled batches, epoch after epoch."""
    size, place = min(args.batch_size, len(table) // table.world_size), (table.rank, table.world_size)
    for epoch in itertools.count():
        yield from batches(table.images, table.targets, size, True, args.seed, epoch, True, *place)


def augment(flow, x, args, generator):
    """What the flow sees of an image: shifted, mirrored, dequantised."""
    x = random_hflip(random_shift(x, args.shift, generator), args.hflip, generator)
    return flow.dequantise(x, generator)


def initialise(flow, table: ImageTable, args: argparse.Namespace) -> None:
    """Data-dependent initialisation on the same images on every process."""
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(table), generator=generator)[:INIT_BATCH]
    flow.initialise(augment(flow, table.images[chosen].float() / 255, args, generator))


def create(args: argparse.Namespace, dataset, table: ImageTable):
    """A flow of the recipe's architecture, initialised on the data."""
    flow = create_flow(
        args.model,
        event_shape=tuple(table.images.shape[1:]),
        num_classes=len(dataset.class_names),
        grey_levels=dataset.grey_levels,
        seed=args.seed,
        **({"coupling": args.coupling} if args.coupling else {}),
    )
    flow.class_names = dataset.class_names
    initialise(flow, table, args)
    return flow


def train(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """Train a flow and write its folder; returns the folder."""
    device, main = accelerator.device, accelerator.is_main_process
    dataset, table, val = load_tables(args, accelerator)
    settle_gaussian_options(args)
    flow = create(args, dataset, table).to(device)
    averaged = ModelEmaV3(flow, decay=args.ema_decay, use_warmup=True)
    flow.set_training_form(getattr(torch, args.conditioner_dtype), args.recompute)
    optimizer = torch.optim.Adamax(flow.parameters(), lr=args.lr)
    log = MetricsLog(args.output, main)
    schedule = GaussianSchedule(args, table, accelerator.reduce, flow)
    run = Run(args.output, recipe_of(args), flow, averaged, optimizer, log, schedule)
    start = run.restore() if args.resume == "auto" else 0
    model, generator = accelerator.prepare(flow), torch.Generator(device)
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=not main, dynamic_ncols=True)
    began = time.time()
    for step, (x, y) in enumerate(training_batches(schedule.phases(), args, start), start):
        generator.manual_seed((args.seed << 40) + (step << 12) + accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        x, y = augment(flow, x.to(device), args, generator), y.to(device)
        loss = flow.bits_per_dim(model(x, y)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update(flow, step=step)
        if note := schedule.after(step + 1, flow):
            log.note("class_gaussians", note)
            averaged.module.gaussians.load_state_dict(flow.gaussians.state_dict())
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            values = evaluate(averaged.module, val, device, accelerator.reduce)
            log.write(step + 1, {"train_bits_per_dim": loss.item(), **values}, bar)
        if (step + 1) % args.save_every == 0 and main:
            run.save(step + 1)
        bar.update()
    bar.close()
    final = averaged.module.eval()
    pca = fit_pca(final, table, device, args.rank)
    log.note("train_seconds", round(time.time() - began, 1))
    if main:
        write_flow_folder(args.output, final, pca, dataset, table, val, recipe_of(args), log)
        run.discard()
    accelerator.wait_for_everyone()
    return args.output


def main(argv: list[str] | None = None) -> None:
    """Command line: one sentence and exit code 1 on failure."""
    try:
        args = parse_args(argv)
        keep_freed_memory()
        accelerator = Accelerator(cpu=args.cpu)
        folder = train(args, accelerator)
        accelerator.print(f"flow written to {folder}; next: python finetune.py --flow-aug {folder}")
    except (ValueError, OSError) as error:
        sys.exit(f"train_flow.py: {error}")


if __name__ == "__main__":
    main()
