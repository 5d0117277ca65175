"""The command lines of the two scripts; what options left out become is in the recipes, or depends on the data."""

import argparse
from pathlib import Path

from timm.utils import ParseKwargs

from flowaug.data.wds.index import is_shards
from flowaug.evaluation.real_labels import OWN
from flowaug.flows.registry import list_flows
from flowaug.mixup.plan import PARTNERS
from flowaug.training.gaussian_schedule import add_gaussian_options
from flowaug.training.optimizers import OPTIMIZERS
from flowaug.training.recipes import add_data_options

COUPLINGS = ("additive", "affine", "matrix_exp")
SCHEDULES = ("cosine", "tanh", "poly", "step")
MANY_IMAGES = 250  # of a class on average; flow mixup was measured with 20, 100 and 500


def flow_parser(description: str) -> argparse.ArgumentParser:
    """The command line of ``train_flow.py``."""
    parser = _parser(description)
    data = add_data_options(parser)
    data.add_argument("--image-size", type=int, help="height and width the flow works at")
    _add_flow_options(parser)
    add_gaussian_options(parser)
    _add_flow_training_options(parser)
    _add_crop_options(parser.add_argument_group("augmentation", "what the flow sees of an image; as the classifier"))
    run = _add_run_options(parser, Path("runs/flow"))
    run.add_argument("--eval-every", type=int, default=500, help="steps between evaluations on the val split")
    return parser


def classifier_parser(description: str) -> argparse.ArgumentParser:
    """The command line of ``finetune.py``."""
    parser = _parser(description)
    data = add_data_options(parser)
    data.add_argument("--real-labels", nargs="?", const=OWN, help="judge by ImageNet's ReaL labels too: real.json")
    data.add_argument("--dataset-copies", type=int, default=1, help="visits to each image per epoch (papers: 3)")
    _add_classifier_options(parser)
    _add_flow_aug_options(parser)
    augment = parser.add_argument_group("other augmentation")
    _add_crop_options(augment)
    _add_mixing_options(augment)
    _add_classifier_training_options(parser)
    _add_run_options(parser, Path("runs/finetune"))
    return parser


def check_disagreements(args: argparse.Namespace, recipe: dict) -> None:
    """Refuse options of ``finetune.py`` that say opposite things or that nothing would read, beside those of a recipe.

    Raises:
        ValueError: naming both and the way out.
    """
    optional = ("p", "rank", "per_axis", "rescaled", "redraws", "policy", "off_epoch", "copies", "or_aa")
    idle = [n for n in optional if getattr(args, f"flow_aug_{n}") is not None]
    rules = {
        f"--flow-aug-{idle[0].replace('_', '-')} needs --flow-aug" if idle else "": idle and not args.flow_aug,
        "--flow-aug-copies augments before training and --flow-aug-off-epoch stops within it; give one": (
            args.flow_aug_copies is not None and args.flow_aug_off_epoch is not None
        ),
        "--flow-aug-copies keeps the images in memory, but shards are a stream; leave it out": (
            args.flow_aug_copies is not None and is_shards(args.dataset, args.data_dir)
        ),
        "--flow-aug-or-aa needs --flow-aug-copies: only before --aa does the flow choose its images": (
            args.flow_aug_or_aa and args.flow_aug_copies is None
        ),
        "--flow-aug-or-aa needs --aa, from which it spares images": (
            args.flow_aug_or_aa and not (args.aa or recipe.get("aa"))
        ),
        "--flow-aug-copies must be at least 1": args.flow_aug_copies is not None and args.flow_aug_copies < 1,
        "--checkpoint and --pretrained name two sets of weights; give one": args.checkpoint and args.pretrained,
        "--mixup-off-epoch needs --mixup or --cutmix": args.mixup_off_epoch is not None
        and not (args.mixup or args.cutmix),
        "--sched step has no restarts; leave out --lr-cycles": args.sched == "step" and args.lr_cycles > 1,
        "--model-ema-decay must lie between 0 and 1": not 0 < args.model_ema_decay < 1,
        "--grad-accum-steps, --dataset-copies and --lr-cycles must be at least 1": min(
            args.grad_accum_steps, args.dataset_copies, args.lr_cycles
        )
        < 1,
    }
    for message, broken in rules.items():
        if broken:
            raise ValueError(message)


def settle_weights(args: argparse.Namespace, images: int, num_classes: int) -> None:
    """Fill in ``--flow-aug-per-axis`` by the number of training images, where neither command nor recipe has it.

    Of few images of a class a weight for each axis makes more; of many one weight keeps labels better: docs/gains.md.
    """
    if args.flow_aug_per_axis is None:
        args.flow_aug_per_axis = images < MANY_IMAGES * num_classes


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", type=Path, metavar="YAML", help="where options left out come from (the data set's)")
    group.add_argument("--quick", action="store_true", help="the recipe's quick mode: a try that any machine can run")
    return parser


def _add_flow_options(parser) -> None:
    flow = parser.add_argument_group("flow")
    flow.add_argument("--model", help=f"architecture: {', '.join(list_flows())}")
    flow.add_argument("--coupling", choices=COUPLINGS, help="coupling of the architecture")
    flow.add_argument(
        "--model-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE", help="as hidden=64 steps=6"
    )
    flow.add_argument("--bits", type=int, choices=range(1, 9), help="bits of a grey level it models (the data's own)")
    flow.add_argument("--rank", type=int, help="principal axes kept per class")
    flow.add_argument("--partners-per-class", type=int, help="images per class kept as partners (all)")
    flow.add_argument("--init-from", metavar="FLOW", help="start from a trained flow; its Gaussians are solved anew")


def _add_flow_training_options(parser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, help="optimiser steps")
    training.add_argument("--max-epochs", type=int, help="fewer steps where --steps would pass the data more often")
    training.add_argument("--batch-size", type=int, help="images per step and process")
    training.add_argument(
        "--opt",
        choices=OPTIMIZERS,
        help="muon learns more in as many steps, at --lr .005 to .015; the papers take adamax (muon)",
    )
    training.add_argument("--lr", type=float, help="peak learning rate")
    training.add_argument("--warmup-steps", type=int, help="steps of linear learning-rate warm-up")
    training.add_argument(
        "--lr-schedule",
        choices=("linear", "halving"),
        default="linear",
        help="linear: constant, then to zero at the end; halving: by half after 1/2, 3/4, 7/8 of the steps",
    )
    training.add_argument(
        "--anneal-share", type=float, help="linear: share of the steps, the last ones, in which it falls to zero (0.4)"
    )
    training.add_argument("--ema-decay", type=float, default=0.998, help="decay of the averaged weights that are saved")
    training.add_argument("--swa-from", type=int, help="step from which the saved weights are the plain mean instead")
    training.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm")
    training.add_argument("--shift", type=int, help="random shift, pixels of the flow's size")
    training.add_argument(
        "--conditioner-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: run the networks in half the bits; events, Gaussians and weights stay in float32",
    )
    training.add_argument("--recompute", action="store_true", help="less memory, a third longer")
    training.add_argument("--torchcompile", action="store_true", help="compile the couplings")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")


def _add_classifier_options(parser) -> None:
    model = parser.add_argument_group("classifier")
    model.add_argument("--model", help="any timm model")
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from timm's weights")
    model.add_argument("--checkpoint", type=Path, help="start from these weights: .safetensors, or .pth of tensors")
    model.add_argument("--img-size", type=int, help="input height and width; default: the model's own")
    model.add_argument("--drop", type=float, help="dropout rate")
    model.add_argument("--drop-path", type=float, help="stochastic depth rate")
    model.add_argument(
        "--model-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE", help="for timm's constructor"
    )


def _add_flow_aug_options(parser) -> None:
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
    switch = argparse.BooleanOptionalAction
    flow.add_argument(
        "--flow-aug-per-axis",
        action=switch,
        help=f"a weight for each axis, not one for all of them (below {MANY_IMAGES} images of a class on average)",
    )
    flow.add_argument("--flow-aug-rescaled", action=switch, help="keep the spread of a class, which mixing shrinks")
    flow.add_argument(
        "--flow-aug-redraws",
        type=int,
        metavar="N",
        help="draw partner and weights anew, N times at most, where the class Gaussians find the label lost",
    )
    flow.add_argument("--flow-aug-policy", type=Path, metavar="JSON", help="p, alpha and rank of single classes")
    flow.add_argument("--flow-aug-off-epoch", type=int, metavar="N", help="no flow augmentation from epoch N on")
    flow.add_argument(
        "--flow-aug-copies",
        type=int,
        metavar="N",
        help="augment before crop and --aa, not after: N augmented copies of the images are made once, kept in memory "
        "at the flow's size, and each visit to an image takes the next",
    )
    flow.add_argument(
        "--flow-aug-or-aa",
        action="store_true",
        default=None,
        help="spare the copies that the flow has moved --aa: no image is changed by both (with --flow-aug-copies)",
    )


def _add_crop_options(group) -> None:
    group.add_argument("--scale", type=float, nargs=2, help="random resized crop: range of the area")
    group.add_argument("--ratio", type=float, nargs=2, help="random resized crop: range of the aspect ratio")
    group.add_argument("--hflip", type=float, help="probability of a mirror image")
    group.add_argument("--aa", help="timm auto-augment policy, for example rand-m9-mstd0.5-inc1")
    group.add_argument("--color-jitter", type=float, help="strength of colour jitter")


def _add_mixing_options(group) -> None:
    group.add_argument("--reprob", type=float, default=0.0, help="probability of RandomErasing")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha of timm's Mixup")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha of CutMix")
    group.add_argument("--mixup-off-epoch", type=int, metavar="N", help="no Mixup and CutMix from epoch N on")
    group.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")


def _add_classifier_training_options(parser) -> None:
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the data")
    length.add_argument("--steps", type=int, help="optimiser steps, whatever the size of the data")
    training.add_argument("--batch-size", type=int, help="images per forward pass and process")
    training.add_argument("--grad-accum-steps", type=int, default=1, metavar="N", help="forward passes per step")
    training.add_argument("--opt", help="timm optimiser")
    training.add_argument("--momentum", type=float, default=0.9, help="of optimisers that have one")
    training.add_argument("--weight-decay", type=float, help="weight decay")
    training.add_argument("--layer-decay", type=float, help="learning rate × this per layer from the head down")
    training.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm")
    training.add_argument("--model-ema", action="store_true", help="evaluate and save averaged weights")
    training.add_argument("--model-ema-decay", type=float, default=0.9998, help="decay of the average")
    training.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision of the classifier")
    training.add_argument("--channels-last", action="store_true", help="memory format of the classifier")
    training.add_argument("--torchcompile", action="store_true", help="compile the classifier")
    training.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    schedule = parser.add_argument_group("learning rate")
    schedule.add_argument("--lr", type=float, help="peak learning rate")
    schedule.add_argument("--sched", choices=SCHEDULES, default="cosine", help="timm scheduler (cosine)")
    schedule.add_argument("--min-lr", type=float, default=0.0, help="where it ends")
    schedule.add_argument("--warmup-share", type=float, help="share of the steps that warm up")
    schedule.add_argument("--decay-share", type=float, default=0.3, help="step: lower it after each share of the steps")
    schedule.add_argument("--decay-rate", type=float, default=0.1, help="step: factor; poly: power")
    schedule.add_argument("--lr-cycles", type=int, default=1, help="cosine, tanh, poly: restarts (SGDR) plus one")
    schedule.add_argument("--lr-cycle-decay", type=float, default=1.0, help="factor of the peak at each restart")
    schedule.add_argument("--sched-on-epochs", action="store_true", help="change it between epochs only")


def _add_run_options(parser, output: Path):
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=output, help=f"folder to write to ({output})")
    run.add_argument("--workers", type=int, default=0, help="loader processes")
    run.add_argument("--resume", choices=("auto", "never"), default="auto", help="go on from a killed run in --output")
    run.add_argument("--save-every", type=int, default=1000, help="steps between states that a killed run resumes from")
    run.add_argument("--log-with", metavar="TRACKER", help="tracker of Accelerate: tensorboard, wandb, trackio, ...")
    run.add_argument("--dry-run", action="store_true", help="print the plan, its memory and time, and stop")
    run.add_argument("--cpu", action="store_true", help="stay on the CPU")
    return run
