"""Fine-tune a timm model, with or without flow augmentation.

    python finetune.py --flow-aug                           # embedded digits and their bundled flow, under a minute
    python finetune.py --dataset fashion_mnist --flow-aug   # trains a flow first and keeps it
    accelerate launch finetune.py --model eva02_base_patch14_448 --data-dir photos/ --flow-aug runs/flow

Options left out come from the recipe of the data set. Labels stay hard and the loss stays as it is.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm.auto import tqdm

import train_flow
from flowaug import FlowMixupTransform, list_pretrained
from flowaug.checkpoint import CONFIG, pack, write_atomic
from flowaug.classifier import BatchPipeline, accuracy, eval_transform, train_transform
from flowaug.data import create_loader, load_dataset
from flowaug.host import keep_freed_memory
from flowaug.loaders import endless_batches
from flowaug.mixup import PARTNERS
from flowaug.recipes import add_data_options, classifier_recipe, deciding_options, fill_in
from flowaug.report import MetricsLog, RunningMean, draw_augmented, one_per_class
from flowaug.state import Run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; options left out come from the recipe of the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = add_data_options(parser)
    data.add_argument("--workers", type=int, default=0, help="loader processes")
    model = parser.add_argument_group("classifier")
    model.add_argument("--model", help="any timm model")
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from timm's weights")
    model.add_argument("--img-size", type=int, help="input height and width; default: the model's own")
    flow = parser.add_argument_group("flow augmentation")
    flow.add_argument(
        "--flow-aug",
        nargs="?",
        const="auto",
        metavar="FLOW",
        help="augment with a flow: a folder or bundled name; no name: the data set's own, trained first if need be",
    )
    flow.add_argument("--flow-aug-p", type=float, help="share of the images that are augmented")
    flow.add_argument("--flow-aug-alpha", type=float, default=1.0, help="weights are drawn from Beta(alpha, alpha)")
    flow.add_argument("--flow-aug-partner", default="bank", choices=PARTNERS, help="where partners come from")
    flow.add_argument("--flow-aug-rank", type=int, help="leading class axes to move along; default: all fitted")
    augment = parser.add_argument_group("other augmentation")
    augment.add_argument("--scale", type=float, nargs=2, help="random resized crop: range of the area")
    augment.add_argument("--ratio", type=float, nargs=2, help="random resized crop: range of the aspect ratio")
    augment.add_argument("--hflip", type=float, help="probability of a mirror image")
    augment.add_argument("--aa", help="timm auto-augment policy, for example rand-m9-mstd0.5-inc1")
    augment.add_argument("--color-jitter", type=float, help="strength of colour jitter")
    augment.add_argument("--reprob", type=float, default=0.0, help="probability of RandomErasing")
    augment.add_argument("--mixup", type=float, default=0.0, help="alpha of timm's Mixup")
    augment.add_argument("--cutmix", type=float, default=0.0, help="alpha of CutMix")
    augment.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the data")
    length.add_argument("--steps", type=int, help="optimiser steps, whatever the size of the data")
    training.add_argument("--batch-size", type=int, help="images per step and process")
    training.add_argument("--opt", help="timm optimiser")
    training.add_argument("--lr", type=float, help="peak learning rate, cosine schedule")
    training.add_argument("--weight-decay", type=float, help="weight decay")
    training.add_argument("--warmup-share", type=float, help="share of the steps that warm up")
    training.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("runs/finetune"), help="folder to write to")
    run.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from a killed run in --output")
    run.add_argument("--save-every", type=int, default=1000, help="steps between states that a killed run resumes from")
    run.add_argument("--cpu", action="store_true", help="stay on the CPU")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or (None if args.data_dir else "digits")
    fill_in(args, _recipe(args))
    return args


def _recipe(args: argparse.Namespace) -> dict:
    recipe = classifier_recipe(args.dataset)
    if args.epochs or args.steps:
        recipe.pop("epochs", None), recipe.pop("steps", None)
    if args.model and args.model != recipe["model"]:
        recipe.pop("img_size", None), recipe.pop("pretrained", None)
    return recipe


def find_flow(args: argparse.Namespace, dataset, accelerator: Accelerator) -> str | Path:
    """The flow to use: the one named, the data set's bundled one, or one trained now and kept beside the outputs."""
    if args.flow_aug != "auto":
        return args.flow_aug
    if args.dataset in list_pretrained() and args.images_per_class is None:
        return args.dataset
    options = train_flow.parse_args(_data_options(args))
    identity = {"data": dataset.fingerprint(), "recipe": train_flow.recipe_of(options)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    options.output = args.output.parent / "flows" / f"{dataset.name}-{key}"
    if (options.output / CONFIG).is_file():
        accelerator.print(f"using the flow trained for this data earlier: {options.output}")
        return options.output
    accelerator.print(f"no flow for this data yet: training one first, kept in {options.output}")
    return train_flow.train(options, accelerator)


def _data_options(args: argparse.Namespace) -> list[str]:
    names = ("dataset", "data_dir", "images_per_class", "subset_seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def create_classifier(args: argparse.Namespace, num_classes: int, channels: int):
    """Build the timm model and its data configuration."""
    if not timm.is_model(timm.models.parse_model_name(args.model)[1].split(".")[0]) and ":" not in args.model:
        close = ", ".join(timm.list_models(f"*{args.model.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"timm has no model {args.model!r}; models of a like name: {close}")
    size = {"img_size": args.img_size} if args.img_size and _takes_img_size(args.model) else {}
    pretrained = timm.models.is_model_pretrained(args.model) if args.pretrained is None else args.pretrained
    model = timm.create_model(args.model, pretrained=pretrained, num_classes=num_classes, in_chans=channels, **size)
    options = {"img_size": args.img_size} if args.img_size else {}
    config = resolve_data_config(options, model=model)
    side = config["input_size"][-1]
    mean, std = (v if channels == 3 else (sum(v) / 3,) for v in (config["mean"], config["std"]))
    return model, ((channels, side, side), mean, std)


def _takes_img_size(name: str) -> bool:
    prefixes = ("vit", "deit", "eva", "swin", "beit", "cait", "xcit", "mixer", "maxvit", "coat", "test_vit")
    return name.split(":")[-1].startswith(prefixes)


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Build timm's Mixup and CutMix, or None when neither is asked for."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


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
    train = create_loader(train_set, transform, batch, True, *options, drop_last=True)
    return train, create_loader(val_set, eval_transform(size), batch, False, *options)


def create_schedule(args: argparse.Namespace, optimizer, steps: int):
    """Cosine schedule with warm-up; what timm calls an epoch is one step here."""
    warmup = {"warmup_epochs": int(args.warmup_share * steps), "warmup_lr": args.lr / 100}
    return create_scheduler_v2(optimizer, sched="cosine", num_epochs=steps, step_on_epochs=True, **warmup)[0]


def finetune(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    """Train, evaluate, write the folder; returns the summary."""
    train_set = load_dataset(args.dataset, args.data_dir, "train", args.images_per_class, args.subset_seed)
    val_set = load_dataset(args.dataset, args.data_dir, "val")
    num_classes, device = len(train_set.class_names), accelerator.device
    set_seed(args.seed)
    model, (input_size, mean, std) = create_classifier(args, num_classes, train_set.channels)
    flow_mixup = load_flow_mixup(args, train_set, accelerator)
    erasing = RandomErasing(args.reprob, mode="pixel", device=str(device)) if args.reprob else None
    pipeline = BatchPipeline(input_size, mean, std, flow_mixup, create_mixup(args, num_classes), erasing).to(device)
    train_loader, val_loader = create_loaders(args, (train_set, val_set), input_size, accelerator)
    steps = args.steps or args.epochs * len(train_loader)
    eval_every = len(train_loader) * max(1, math.ceil(steps / len(train_loader)) // 10)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = create_schedule(args, optimizer, steps)
    hard_loss = torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    criterion = SoftTargetCrossEntropy() if pipeline.mixup else hard_loss
    model = model.to(device)
    log, mean_loss = MetricsLog(args.output, accelerator.is_main_process), RunningMean(device)
    parts = (model, optimizer, log, mean_loss, flow_mixup)
    run = Run(args.output, recipe_of(args), *(part for part in parts if part is not None))
    start = run.restore() if args.resume == "auto" else 0
    model, optimizer = accelerator.prepare(model, optimizer)
    bar = tqdm(total=steps, initial=start, unit="step", disable=not accelerator.is_main_process, dynamic_ncols=True)
    began = time.time()
    model.train()
    for step, (x, y) in zip(range(start, steps), endless_batches(train_loader, start), strict=False):
        seed_step(args.seed, step, accelerator.process_index, flow_mixup)
        scheduler.step(step)
        x, y = pipeline.train(x.to(device), y.to(device))
        loss = criterion(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss.update(loss.detach())
        bar.update()
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            values = accuracy(model, val_loader, pipeline, device, accelerator.reduce)
            log.write(step + 1, {"train_loss": mean_loss.value, **values}, bar)
        if (step + 1) % args.save_every == 0 and accelerator.is_main_process:
            run.save(step + 1)
    bar.close()
    return finish(args, accelerator, run, model, log, flow_mixup, val_set, time.time() - began)


def seed_step(seed: int, step: int, rank: int, flow_mixup: FlowMixupTransform | None) -> None:
    """Make dropout, mixing and erasing of a step depend on its number alone, so that a resumed run repeats them."""
    set_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0]))
    if flow_mixup is not None:
        flow_mixup.reseed(seed, rank, step)


def recipe_of(args: argparse.Namespace) -> dict:
    """The options that decide the numbers of the classifier."""
    return deciding_options(args, skip=("output", "resume", "save_every", "cpu", "workers"))


def finish(args, accelerator, run: Run, model, log: MetricsLog, flow_mixup, dataset, seconds: float) -> dict:
    """Write weights, curves, the before/after grid and the summary."""
    if accelerator.is_main_process:
        write_atomic(args.output / "model.safetensors", pack(accelerator.unwrap_model(model).state_dict()))
        log.plot(["train_loss", "top1"], f"{args.model} on {dataset.name}")
        if flow_mixup is not None:
            log.note("flow_aug", flow_mixup.counts)
            draw_before_after(flow_mixup, dataset, args.output / "augmented.png")
        run.discard()
    return log.finish(model=args.model, seconds=round(seconds, 1), steps=log.last["step"])


def draw_before_after(flow_mixup: FlowMixupTransform, dataset, path: Path) -> None:
    """Draw one image per class, before and after, at the data set's own size."""
    chosen = one_per_class(torch.as_tensor(dataset.targets)).tolist()
    transform = eval_transform(max(dataset.image_size))
    x = torch.stack([transform(dataset.image(i)) for i in chosen])
    draw_augmented(flow_mixup, x, torch.as_tensor(dataset.targets[chosen]), path)


def main(argv: list[str] | None = None) -> None:
    """Command line: one sentence and exit code 1 on failure."""
    try:
        args = parse_args(argv)
        keep_freed_memory()
        accelerator = Accelerator(cpu=args.cpu)
        summary = finetune(args, accelerator)
        accelerator.print(
            f"test accuracy {summary['top1']:.4f} (top-5 {summary['top5']:.4f}) on {summary['images']} images"
        )
        names = "metrics.json, curves.png, model.safetensors" + (
            ", augmented.png (before/after)" if args.flow_aug else ""
        )
        accelerator.print(f"outputs in {args.output}: {names}")
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: {error}")


if __name__ == "__main__":
    main()
