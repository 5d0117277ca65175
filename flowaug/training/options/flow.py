"""Options of ``flowaug train-flow``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowaug.training.options.data import RunOptions, TransformOptions
from flowaug.training.options.fields import OptionError, Options, option


@dataclass(frozen=True)
class FlowOptions(Options):
    """Flow."""

    model: str = option("mef_small", "flow architecture; flowaug.list_flows() names all of them")
    coupling: Literal["additive", "affine", "matrix_exp"] | None = option(
        None, "coupling layers: affine is faster, matrix_exp is the papers'; jet_* has its own (default: affine)"
    )
    model_kwargs: dict[str, Any] = option({}, "arguments of the architecture, for example hidden=64 steps=6")
    image_size: int = option(32, "height and width of the flow's images", at_least=2)
    bits: int | None = option(
        None,
        "bits per colour channel that the flow models (default: those of the data, 8 for photographs)",
        at_least=1,
        at_most=8,
    )
    rank: int = option(64, "number of principal components fitted per class", at_least=1)
    partners_per_class: int | None = option(
        None, "training images per class kept as mixing partners (default: all)", at_least=1
    )
    init_from: str | None = option(
        None, "start from a trained flow (folder or name); its class Gaussians are solved for again", metavar="FLOW"
    )


@dataclass(frozen=True)
class FlowTrainingOptions(Options):
    """Training."""

    steps: int = option(20_000, "optimizer steps", at_least=1)
    max_epochs: int = option(200, "upper bound on epochs; caps --steps on small data sets", at_least=1)
    batch_size: int = option(128, "images per step and process", at_least=1)
    opt: Literal["muon", "adamax"] = option("muon", "optimizer; muon learns more per step, adamax is the papers'")
    lr: float = option(0.007, "peak learning rate; 0.005 to 0.015 suits muon", at_least=0)
    warmup_steps: int = option(500, "steps of linear learning-rate warm-up", at_least=0)
    lr_schedule: Literal["linear", "halving"] = option(
        "linear", "linear: constant, then linear decay to 0; halving: the rate is halved twice, after each third"
    )
    decay_ratio: float | None = option(
        None,
        "linear schedule: fraction of the training over which the rate decays to 0 (default: 0.4)",
        above=0,
        at_most=1,
    )
    ema_decay: float = option(0.998, "decay of the exponential moving average of the weights", at_least=0, below=1)
    swa_from: int | None = option(
        None, "first step of SWA: from here on average the weights uniformly instead of exponentially", at_least=0
    )
    clip_grad: float = option(1.0, "clip the gradient norm at this value", above=0)
    conditioner_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "data type of the conditioner networks; bfloat16 is faster where the hardware supports it"
    )
    grad_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about a third slower"
    )
    torchcompile: bool = option(False, "compile the couplings with torch.compile")
    seed: int = option(0, "seed of weights, order and noise", at_least=0)
    eval_every: int = option(500, "steps between evaluations on the validation set", at_least=1)

    def check(self) -> None:
        """Refuse options of the linear schedule with another one."""
        if self.decay_ratio is not None and self.lr_schedule != "linear":
            message = f"--decay-ratio belongs to --lr-schedule linear; leave it out of --lr-schedule {self.lr_schedule}"
            raise OptionError("decay_ratio", message)


@dataclass(frozen=True)
class FlowTransformOptions(TransformOptions):
    """Image augmentation (option names of timm's train.py)."""

    shift: int = option(2, "random shift in pixels at the flow's image size", at_least=0)


@dataclass(frozen=True)
class FlowRunOptions(RunOptions):
    """Run."""

    output: Path = option(Path("runs/flow"), "output folder")
