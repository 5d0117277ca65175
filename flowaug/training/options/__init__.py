"""Options of the two trainings: one frozen dataclass per concern, read from the command line and from recipes."""

from flowaug.training.options.classifier import (
    DEFAULT_EPOCHS,
    ClassifierOptions,
    ClassifierTrainingOptions,
    ClassifierTransformOptions,
    FinetuneRunOptions,
    FlowAugOptions,
    ScheduleOptions,
)
from flowaug.training.options.commands import CommandOptions, FinetuneOptions, TrainFlowOptions
from flowaug.training.options.data import DataOptions, RecipeOptions, RunOptions, TransformOptions
from flowaug.training.options.fields import OptionError, Options
from flowaug.training.options.flow import (
    FlowOptions,
    FlowRunOptions,
    FlowTrainingOptions,
    FlowTransformOptions,
)
from flowaug.training.options.gaussians import GaussianOptions

__all__ = [
    "DEFAULT_EPOCHS",
    "ClassifierOptions",
    "ClassifierTrainingOptions",
    "ClassifierTransformOptions",
    "CommandOptions",
    "DataOptions",
    "FinetuneOptions",
    "FinetuneRunOptions",
    "FlowAugOptions",
    "FlowOptions",
    "FlowRunOptions",
    "FlowTrainingOptions",
    "FlowTransformOptions",
    "GaussianOptions",
    "OptionError",
    "Options",
    "RecipeOptions",
    "RunOptions",
    "ScheduleOptions",
    "TrainFlowOptions",
    "TransformOptions",
]
