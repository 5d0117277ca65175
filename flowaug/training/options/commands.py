"""All options of a command: its groups side by side, in one flat set of names."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from flowaug.data.wds.index import is_shards
from flowaug.training.options.classifier import (
    ClassifierOptions,
    ClassifierTrainingOptions,
    ClassifierTransformOptions,
    FinetuneRunOptions,
    FlowAugOptions,
    ScheduleOptions,
)
from flowaug.training.options.data import DataOptions, RecipeOptions, RunOptions, TransformOptions
from flowaug.training.options.fields import OptionError, Options
from flowaug.training.options.flow import (
    FlowOptions,
    FlowRunOptions,
    FlowTrainingOptions,
    FlowTransformOptions,
)
from flowaug.training.options.gaussians import GaussianOptions

Command = TypeVar("Command", bound="CommandOptions")


@dataclass(frozen=True)
class CommandOptions:
    """Base of the options of a command; every field is a group of options."""

    part: ClassVar[str]  # the part of a recipe that holds them

    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise an OptionError for options of different groups that contradict each other."""

    @classmethod
    def groups(cls) -> dict[str, type[Options]]:
        """Return the dataclass of each group, by the name of its field."""
        hints = get_type_hints(cls)
        return {item.name: hints[item.name] for item in dataclasses.fields(cls)}

    @classmethod
    def names(cls) -> set[str]:
        """Return the names of all options."""
        return {item.name for group in cls.groups().values() for item in dataclasses.fields(group)}

    @classmethod
    def from_values(cls: type[Command], values: Mapping[str, Any]) -> Command:
        """Create the groups from one flat mapping; options that are left out get their defaults.

        Raises:
            OptionError: an unknown name, a value that an option cannot have, or options that contradict each other.
        """
        for name in values:
            if name not in cls.names():
                raise OptionError(name, f"unknown option {name!r} of {cls.part!r}")
        groups: dict[str, Any] = {name: _create(group, values) for name, group in cls.groups().items()}
        return cls(**groups)

    def values(self) -> dict[str, Any]:
        """Return all options in one flat dictionary."""
        groups = (getattr(self, name) for name in self.groups())
        return {item.name: getattr(group, item.name) for group in groups for item in dataclasses.fields(group)}

    def hashable_options(self, *skip: str) -> dict[str, Any]:
        """Return the options that decide the results as JSON values: without those of the run and those in ``skip``."""
        of_the_run = {item.name for group in (RecipeOptions, RunOptions) for item in dataclasses.fields(group)}
        ignored = of_the_run - {"workers"} | set(skip)
        return {name: _as_json(value) for name, value in self.values().items() if name not in ignored}


def _create(group: type[Options], values: Mapping[str, Any]) -> Options:
    return group(**{item.name: values[item.name] for item in dataclasses.fields(group) if item.name in values})


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class TrainFlowOptions(CommandOptions):
    """Options of ``flowaug train-flow``."""

    part: ClassVar[str] = "flow"

    flow: FlowOptions = field(default_factory=FlowOptions)
    gaussians: GaussianOptions = field(default_factory=GaussianOptions)
    training: FlowTrainingOptions = field(default_factory=FlowTrainingOptions)
    transforms: FlowTransformOptions = field(default_factory=FlowTransformOptions)
    run: FlowRunOptions = field(default_factory=FlowRunOptions)

    @property
    def uses_timm_transforms(self) -> bool:
        """Whether images go through timm's transform instead of being shifted and flipped in memory."""
        return uses_timm_transforms(self.transforms)

    def training_options(self) -> dict[str, Any]:
        """Return the options that decide the weights of the flow."""
        streamed = self.uses_timm_transforms and is_shards(self.data.dataset, self.data.data_dir)
        return self.hashable_options("eval_every", "grad_checkpointing", *(() if streamed else ("workers",)))


def uses_timm_transforms(transforms: TransformOptions) -> bool:
    """Whether options ask for crops, auto-augment or colour jitter, which timm does image by image."""
    asked = (transforms.scale, transforms.ratio, transforms.aa, transforms.color_jitter)
    return any(value is not None for value in asked)


@dataclass(frozen=True)
class FinetuneOptions(CommandOptions):
    """Options of ``flowaug finetune``."""

    part: ClassVar[str] = "classifier"

    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    flow_aug: FlowAugOptions = field(default_factory=FlowAugOptions)
    transforms: ClassifierTransformOptions = field(default_factory=ClassifierTransformOptions)
    training: ClassifierTrainingOptions = field(default_factory=ClassifierTrainingOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    run: FinetuneRunOptions = field(default_factory=FinetuneRunOptions)

    @property
    def streamed(self) -> bool:
        """Whether the data are webdataset shards, whose order depends on the number of workers."""
        return is_shards(self.data.dataset, self.data.data_dir)

    def training_options(self) -> dict[str, Any]:
        """Return the options that decide the weights of the classifier."""
        return self.hashable_options(*(() if self.streamed else ("workers",)))

    def check(self) -> None:
        """Refuse copies of a stream, and ``--flow-aug-or-aa`` without ``--aa``."""
        if self.flow_aug.flow_aug_copies is not None and self.streamed:
            message = "--flow-aug-copies keeps the images in memory, but webdataset shards are a stream; leave it out"
            raise OptionError("flow_aug_copies", message)
        if self.flow_aug.flow_aug_or_aa and not self.transforms.aa:
            raise OptionError("flow_aug_or_aa", "--flow-aug-or-aa requires --aa")
