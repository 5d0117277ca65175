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
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

import train_flow
from flowaug import FlowMixupTransform, list_pretrained
from flowaug.checkpoint import CONFIG, pack, read_config, write_atomic
from flowaug.classifier import accuracy, eval_transform, train_transform
from flowaug.copies import AugmentedCopies
from flowaug.data import create_loader
from flowaug.finetuning import (
    create_classifier,
    create_loss,
    create_optimizer,
    create_pipeline,
    create_schedule,
    memory_format,
)
from flowaug.host import keep_freed_memory
from flowaug.loaders import endless_batches
from flowaug.options import check_disagreements, classifier_parser
from flowaug.plan import classifier_plan
from flowaug.real_labels import RealLabels
from flowaug.recipes import deciding_options, given_data_options, load_split, parse_with_recipe
from flowaug.report import MetricsLog, RunningMean, draw_augmented
from flowaug.shardlists import is_shards
from flowaug.state import Run
from flowaug.streams import count_skipped
from flowaug.trackers import create_accelerator, start_tracking


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out come from the recipe."""
    return parse_with_recipe(classifier_parser(__doc__), argv, "classifier", settle_recipe)


def settle_recipe(given: argparse.Namespace, recipe: dict) -> dict:
    """What the recipe comes to beside the options given: another length or model takes some of it back."""
    check_disagreements(given)
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
        return f"{source}, {config['architecture']} for images {tuple(config['event_shape'])}"
    options = flow_options(args, dataset)
    trained = (options.output / CONFIG).is_file()
    return f"{options.output}" + ("" if trained else f", trained first: {options.model}, {options.steps} steps at most")


def load_flow_mixup(args: argparse.Namespace, dataset, accelerator: Accelerator) -> FlowMixupTransform | None:
    """The flow augmentation that --flow-aug asks for, or None."""
    if not args.flow_aug:
        return None
    return FlowMixupTransform.from_pretrained(
        find_flow(args, dataset, accelerator),
        accelerator.device,
        p=args.flow_aug_p,
        alpha=args.flow_aug_alpha,
        partner=args.flow_aug_partner,
        rank=args.flow_aug_rank,
        policy=args.flow_aug_policy,
        class_names=dataset.class_names,
        seed=args.seed,
        process_index=accelerator.process_index,
    )


def create_loaders(args: argparse.Namespace, sets, input_size: tuple[int, int, int], accelerator: Accelerator):
    """Loaders of uint8 images; those smaller than the model's input are enlarged on the device, after the flow."""
    train_set, val_set = sets
    size = min(input_size[-1], max(train_set.image_size))
    place = (accelerator.process_index, accelerator.num_processes)
    batch = min(args.batch_size, len(train_set) // accelerator.num_processes)
    options = (args.seed, args.workers, *place)
    transform = train_transform(size, input_size[0], args)
    train = create_loader(train_set, transform, batch, True, *options, drop_last=True, copies=args.dataset_copies)
    return train, create_loader(val_set, eval_transform(size), batch, False, *options)


def finetune(args: argparse.Namespace, accelerator: Accelerator) -> dict | None:
    """Train, evaluate, write the folder; returns the summary (None after --dry-run)."""
    sets = [load_split(args, split) for split in ("train", "val")]
    num_classes, device = len(sets[0].class_names), accelerator.device
    place = (accelerator.process_index, accelerator.num_processes)
    real = RealLabels(args.real_labels, sets[1], *place) if args.real_labels else None
    set_seed(args.seed)
    model, spec = create_classifier(args, num_classes, sets[0].channels)
    train_loader, val_loader = create_loaders(args, sets, spec[0], accelerator)
    per_epoch = max(1, len(train_loader) // args.grad_accum_steps)
    steps = args.steps or args.epochs * per_epoch
    if args.dry_run:
        flow = describe_flow(args, sets[0])
        return accelerator.print(classifier_plan(args, model, spec[0], sets, steps, flow, accelerator))
    flow_mixup = load_flow_mixup(args, sets[0], accelerator)
    if args.flow_aug_copies:
        sets[0] = AugmentedCopies(sets[0], flow_mixup, args.flow_aug_copies, args.seed)
        train_loader, _ = create_loaders(args, sets, spec[0], accelerator)
    pipeline = create_pipeline(args, spec, None if args.flow_aug_copies else flow_mixup, num_classes, device)
    optimizer = create_optimizer(args, model)
    scheduler = create_schedule(args, optimizer, steps)
    criterion = create_loss(args)
    model = model.to(device, memory_format=memory_format(args))
    averaged = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
    log = MetricsLog(args.output, accelerator.is_main_process, start_tracking(accelerator, "finetune", recipe_of(args)))
    mean_loss = RunningMean(device)
    parts = (model, averaged, optimizer, accelerator.scaler, log, mean_loss, flow_mixup)
    run = Run(args.output, recipe_of(args), *(part for part in parts if part is not None))
    start = run.restore() if args.resume == "auto" else 0
    if args.torchcompile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    stream = endless_batches(train_loader, start * args.grad_accum_steps)
    bar = tqdm(total=steps, initial=start, unit="step", disable=not accelerator.is_main_process, dynamic_ncols=True)
    began = time.time()
    model.train()
    for step in range(start, steps):
        epoch = step // per_epoch
        scheduler.step(epoch * per_epoch if args.sched_on_epochs else step)
        batches = step_batches(args, accelerator, stream, pipeline, step, epoch)
        mean_loss.update(backward(args, accelerator, model, criterion, batches))
        accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            averaged.update(accelerator.unwrap_model(model), step=step)
        bar.update()
        if (step + 1) % evaluation_steps(steps, per_epoch) == 0 or step + 1 == steps:
            judged = model if averaged is None else averaged.module
            values = accuracy(judged, val_loader, pipeline, device, accelerator.reduce, real)
            log.write(step + 1, {"train_loss": mean_loss.value, **values}, bar)
        if (step + 1) % args.save_every == 0 and accelerator.is_main_process:
            run.save(step + 1)
    bar.close()
    if skipped := count_skipped({"train": sets[0], "val": sets[1]}, gather_object):
        log.note("skipped", skipped)
    final = accelerator.unwrap_model(model) if averaged is None else averaged.module
    return finish(args, accelerator, run, final, log, flow_mixup, sets[1], time.time() - began)


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


def evaluation_steps(steps: int, per_epoch: int) -> int:
    """Steps between evaluations: whole epochs, ten times in all at most."""
    return per_epoch * max(1, math.ceil(steps / per_epoch) // 10)


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


def finish(args, accelerator, run: Run, model, log: MetricsLog, flow_mixup, dataset, seconds: float) -> dict:
    """Write weights, curves, the before/after grid and the summary."""
    if accelerator.is_main_process:
        write_atomic(args.output / "model.safetensors", pack(model.state_dict()))
        log.plot(["train_loss", "top1"], f"{args.model} on {dataset.name}")
        if flow_mixup is not None:
            log.note("flow_aug", flow_mixup.counts)
            draw_before_after(flow_mixup, dataset, args.output / "augmented.png")
        run.discard()
    return log.finish(model=args.model, seconds=round(seconds, 1), steps=log.last["step"])


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
        accelerator.print(
            f"test accuracy {summary['top1']:.4f} (top-5 {summary['top5']:.4f}) on {summary['images']} images"
        )
        names = "metrics.json, curves.png, model.safetensors" + (
            ", augmented.png (before/after)" if args.flow_aug else ""
        )
        accelerator.print(f"outputs in {args.output}: {names}")
        accelerator.end_training()
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: {error}")


if __name__ == "__main__":
    main()
