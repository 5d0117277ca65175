"""Options of the data and of the transforms of single images, which both trainings share."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowaug.data import ImageDataset, load_dataset
from flowaug.data.wds.dataset import StreamDataset
from flowaug.training.options.fields import Options, option


@dataclass(frozen=True)
class RecipeOptions(Options):
    """Recipe."""

    recipe: str | None = option(
        None,
        "defaults for all options: a YAML file, or the name of a recipe that ships with flowaug, see flowaug list "
        "(default: the recipe of the data set)",
        metavar="YAML",
        aliases=("-c", "--config"),
    )
    quick: bool = option(False, "smoke test: a scaled-down version of the recipe, minutes on a CPU")


@dataclass(frozen=True)
class DataOptions(Options):
    """Data (default: the embedded digits)."""

    dataset: str | None = option(
        None, "data set by name: digits, fashion_mnist, wds/ (shards), or timm's torch/NAME and hfds/NAME"
    )
    data_dir: Path | None = option(
        None,
        "folder with train/ and val/, one folder per class; or a folder or pattern of webdataset shards; or the root "
        "of a torch/ or hfds/ data set",
    )
    num_classes: int | None = option(None, "check that the data have this many classes", at_least=1)
    class_map: Path | None = option(
        None, 'JSON file that gives class names their labels: {"class name": label} or a list of names'
    )
    train_samples: int | None = option(
        None, "samples per epoch of webdataset shards (default: counted once and cached)", at_least=1
    )
    images_per_class: int | None = option(
        None, "use a random subset of this many training images per class", at_least=2
    )
    subset_seed: int = option(0, "seed of the subset that --images-per-class selects", at_least=0)

    def open(self, split: str) -> ImageDataset | StreamDataset:
        """Open the split "train" or "val"; the subset is one of training images."""
        return load_dataset(
            self.dataset,
            self.data_dir,
            split,
            self.images_per_class if split == "train" else None,
            self.subset_seed,
            class_map=self.class_map,
            num_classes=self.num_classes,
            train_samples=self.train_samples,
        )


@dataclass(frozen=True)
class TransformOptions(Options):
    """Image augmentation (the same option names as timm's train.py)."""

    scale: tuple[float, float] | None = option(
        None, "random resized crop: range of the cropped area as a fraction of the image", above=0, at_most=1
    )
    ratio: tuple[float, float] | None = option(None, "random resized crop: range of the aspect ratio", above=0)
    hflip: float = option(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    aa: str | None = option(None, "timm's auto-augment policy, for example rand-m9-mstd0.5-inc1")
    color_jitter: float | None = option(None, "strength of timm's colour jitter; ignored with --aa", at_least=0)


@dataclass(frozen=True)
class RunOptions(Options):
    """Run."""

    output: Path = option(Path("runs"), "output folder")
    workers: int = option(min(4, os.cpu_count() or 1), "data loader processes; 4, or one per CPU core", at_least=0)
    resume: Literal["auto", "never"] = option(
        "auto", "auto: continue an interrupted run found in --output; never: start from the beginning"
    )
    overwrite: bool = option(False, "train again into an output folder that holds a finished run")
    save_every: int = option(1000, "steps between training states, from which an interrupted run resumes", at_least=1)
    log_with: str | None = option(None, "experiment tracker of Accelerate: tensorboard, wandb, trackio, ...")
    dry_run: bool = option(False, "print the plan of the run with its memory and time, and stop")
    cpu: bool = option(False, "use the CPU even if there is a GPU")
