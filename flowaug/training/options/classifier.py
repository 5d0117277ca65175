"""Options of ``flowaug finetune``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowaug.evaluation.real_labels import TIMM_COPY
from flowaug.training.options.data import RunOptions, TransformOptions
from flowaug.training.options.fields import OptionError, Options, option

DEFAULT_EPOCHS = 10


@dataclass(frozen=True)
class ClassifierOptions(Options):
    """Classifier."""

    model: str = option("resnet18", "any timm model")
    pretrained: bool | None = option(None, "start from timm's pretrained weights (default: where timm has some)")
    checkpoint: Path | None = option(
        None, "start from the weights in this file: .safetensors, or .pth that holds tensors only"
    )
    img_size: int | None = option(None, "height and width of the input (default: the model's own)", at_least=1)
    crop_pct: float | None = option(
        None,
        "evaluation: fraction of the resized image that the crop keeps (default: the model's own)",
        above=0,
        at_most=1,
    )
    crop_mode: Literal["center", "squash", "border"] | None = option(
        None, "evaluation: crop mode of timm (default: the model's own)"
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] | None = option(
        None, "filter that resizes images (default: the model's own)"
    )
    drop: float | None = option(None, "dropout rate", at_least=0, below=1)
    drop_path: float | None = option(None, "stochastic depth rate", at_least=0, below=1)
    model_kwargs: dict[str, Any] = option({}, "further arguments of timm's constructor")
    channels_last: bool = option(False, "use the channels-last memory format")
    torchcompile: bool = option(False, "compile the classifier with torch.compile")
    real_labels: str | None = option(
        None,
        "also evaluate with ImageNet's ReaL labels: path of real.json; without a path the copy that timm ships",
        bare=TIMM_COPY,
        metavar="JSON",
    )

    def check(self) -> None:
        """Refuse two sources of weights."""
        if self.checkpoint and self.pretrained:
            raise OptionError("checkpoint", "--checkpoint and --pretrained are two sources of weights; give one")


@dataclass(frozen=True)
class FlowAugOptions(Options):
    """Flow augmentation."""

    flow_aug: str | None = option(
        None,
        "augment with a flow: its folder, bundled name or hf-hub:ORG/NAME[@REVISION]; without a value the flow of the "
        "data set, trained first if there is none; --no-flow-aug switches a recipe's off",
        bare="auto",
        metavar="FLOW",
    )
    flow_aug_p: float | None = option(
        None, "fraction of the images that are augmented (default: the flow's own, 0.5)", at_least=0, at_most=1
    )
    flow_aug_alpha: float | None = option(
        None, "mixing weights are drawn from Beta(alpha, alpha) (default: the flow's own, 0.3)", above=0
    )
    flow_aug_partner: Literal["bank", "batch", "gaussian"] = option(
        "bank", "mixing partners: any training image (bank), one of the batch, or a draw from the class Gaussian"
    )
    flow_aug_rank: int | None = option(
        None, "number of leading principal components to mix (default: all fitted)", at_least=1
    )
    flow_aug_per_axis: bool | None = option(
        None,
        "draw one mixing weight per principal component instead of one per image (default: with fewer than 250 images "
        "per class)",
    )
    flow_aug_rescaled: bool | None = option(
        None, "rescale mixed latents so that the class variance is preserved (default: yes)"
    )
    flow_aug_redraws: int = option(
        0,
        "number of times to resample partner and weight of a mixed image that the flow classifies differently; needs "
        "a few hundred images per class to be reliable",
        at_least=0,
        metavar="N",
    )
    flow_aug_policy: Path | None = option(None, "JSON file with p, alpha and rank of single classes", metavar="JSON")
    flow_aug_off_epoch: int | None = option(
        None, "switch flow augmentation off from this epoch on", at_least=0, metavar="N"
    )
    flow_aug_copies: int | None = option(
        None,
        "precompute N flow-augmented copies of the training set, kept in memory at the flow's image size, and apply "
        "crops and --aa to those (default: augment batches, after crops and --aa)",
        at_least=1,
        metavar="N",
    )
    flow_aug_or_aa: bool = option(
        False, "apply --aa only to images that flow mixup left unchanged (with --flow-aug-copies)"
    )

    def check(self) -> None:
        """Refuse options of copies without them, and options that copies cannot have."""
        if self.flow_aug_copies is not None and self.flow_aug_off_epoch is not None:
            message = "--flow-aug-copies augments before the training, so --flow-aug-off-epoch cannot apply; give one"
            raise OptionError("flow_aug_off_epoch", message)
        if self.flow_aug_or_aa and self.flow_aug_copies is None:
            raise OptionError("flow_aug_or_aa", "--flow-aug-or-aa requires --flow-aug-copies")

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of `FlowMixupTransform`; those left out are the flow's own settings."""
        names = ("p", "alpha", "partner", "rank", "per_axis", "rescaled", "redraws", "policy")
        given = {name: getattr(self, f"flow_aug_{name}") for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class ClassifierTransformOptions(TransformOptions):
    """Other augmentation (option names of timm's train.py)."""

    scale: tuple[float, float] | None = option(
        (0.35, 1.0), "random resized crop: range of the cropped area as a fraction of the image", above=0, at_most=1
    )
    ratio: tuple[float, float] | None = option(
        (0.75, 1.3333), "random resized crop: range of the aspect ratio", above=0
    )
    reprob: float = option(0.0, "probability of random erasing", at_least=0, at_most=1)
    mixup: float = option(0.0, "alpha of timm's Mixup; 0 is off", at_least=0)
    cutmix: float = option(0.0, "alpha of timm's CutMix; 0 is off", at_least=0)
    mixup_off_epoch: int | None = option(
        None, "switch Mixup and CutMix off from this epoch on", at_least=0, metavar="N"
    )
    smoothing: float = option(0.0, "label smoothing", at_least=0, below=1)

    def check(self) -> None:
        """Refuse an end of Mixup without Mixup."""
        if self.mixup_off_epoch is not None and not self.mixes:
            raise OptionError("mixup_off_epoch", "--mixup-off-epoch needs --mixup or --cutmix")

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix makes the labels soft."""
        return bool(self.mixup or self.cutmix)


@dataclass(frozen=True)
class ClassifierTrainingOptions(Options):
    """Training."""

    epochs: int | None = option(
        None, f"passes over the training set (default: {DEFAULT_EPOCHS}, unless --steps is given)", at_least=1
    )
    steps: int | None = option(None, "optimizer steps, instead of --epochs", at_least=1)
    epoch_repeats: int = option(1, "number of times each image is used per epoch (papers: 3)", at_least=1)
    batch_size: int = option(64, "images per forward pass and process", at_least=1)
    grad_accum_steps: int = option(1, "forward passes per optimizer step", at_least=1, metavar="N")
    opt: str = option("adamw", "any timm optimizer")
    momentum: float = option(0.9, "SGD momentum", at_least=0, below=1)
    weight_decay: float = option(0.05, "weight decay", at_least=0)
    layer_decay: float | None = option(
        None, "multiply the learning rate by this factor per layer, from the head down", above=0, at_most=1
    )
    clip_grad: float = option(1.0, "clip the gradient norm at this value", above=0)
    model_ema: bool = option(False, "evaluate and save an exponential moving average of the weights")
    model_ema_decay: float = option(0.9998, "decay of the moving average", above=0, below=1)
    amp: Literal["no", "bf16", "fp16"] | None = option(
        None, "mixed precision of the classifier (default: what Accelerate is configured with, else no)"
    )
    seed: int = option(0, "seed of weights, order and augmentation", at_least=0)

    def check(self) -> None:
        """Refuse two lengths."""
        if self.epochs is not None and self.steps is not None:
            raise OptionError("steps", "--epochs and --steps are two lengths of the training; give one")


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """Learning rate."""

    lr: float = option(0.001, "peak learning rate", at_least=0)
    sched: Literal["cosine", "tanh", "poly", "step"] = option("cosine", "timm scheduler")
    min_lr: float = option(0.0, "final learning rate", at_least=0)
    warmup_ratio: float = option(0.05, "fraction of the training with linear warm-up", at_least=0, below=1)
    decay_ratio: float = option(0.3, "step scheduler: fraction of the training between two decays", above=0, at_most=1)
    decay_rate: float = option(0.1, "step scheduler: factor of a decay; poly: power", above=0)
    lr_cycles: int = option(1, "number of cosine, tanh or poly cycles (1: no warm restart)", at_least=1)
    lr_cycle_decay: float = option(1.0, "factor of the peak learning rate at each restart", above=0)
    sched_on_epochs: bool = option(False, "update the learning rate per epoch instead of per step")

    def check(self) -> None:
        """Refuse restarts of a scheduler that has none."""
        if self.sched == "step" and self.lr_cycles > 1:
            raise OptionError("lr_cycles", "--sched step has no restarts; leave out --lr-cycles")


@dataclass(frozen=True)
class FinetuneRunOptions(RunOptions):
    """Run."""

    output: Path = option(Path("runs/finetune"), "output folder")
