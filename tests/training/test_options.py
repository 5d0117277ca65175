"""Options: one declaration, two readers (command line and recipe), one validation after the merge."""

import argparse
import dataclasses

import pytest

from flowaug.mixup.settings import has_few_images
from flowaug.training import finetune, train_flow
from flowaug.training.flow_source import mixup_keywords
from flowaug.training.options import DataOptions, FinetuneOptions, OptionError, Options, TrainFlowOptions
from flowaug.training.options.command_line import create_parser
from flowaug.training.options.fields import option
from flowaug.training.options.recipes import resolve_options
from tests.conftest import finetune_options, flow_options

DISAGREE = [
    (["--flow-aug-policy", "p.json"], "--flow-aug-policy needs --flow-aug"),
    (["--flow-aug-off-epoch", "3"], "--flow-aug-off-epoch needs --flow-aug"),
    (["--flow-aug-copies", "3"], "--flow-aug-copies needs --flow-aug"),
    (["--flow-aug-per-axis"], "--flow-aug-per-axis needs --flow-aug"),
    (["--flow-aug-rescaled"], "--flow-aug-rescaled needs --flow-aug"),
    (["--flow-aug-redraws", "2"], "--flow-aug-redraws needs --flow-aug"),
    (["--flow-aug", "--flow-aug-copies", "3", "--flow-aug-off-epoch", "1"], "give one"),
    (["--flow-aug", "--flow-aug-or-aa", "--aa", "rand-m9"], "--flow-aug-or-aa requires --flow-aug-copies"),
    (["--flow-aug", "--flow-aug-copies", "3", "--flow-aug-or-aa"], "--flow-aug-or-aa requires --aa"),
    (["--flow-aug", "--flow-aug-copies", "0"], "--flow-aug-copies is '0'; expected a number of at least 1"),
    (["--flow-aug", "--flow-aug-copies", "3", "--dataset", "wds/"], "webdataset shards are a stream"),
    (["--checkpoint", "w.pth", "--pretrained"], "two sources of weights"),
    (["--mixup-off-epoch", "2"], "needs --mixup or --cutmix"),
    (["--sched", "step", "--lr-cycles", "2"], "no restarts"),
    (["--epochs", "2", "--steps", "2"], "two lengths of the training"),
    (["--model-ema-decay", "1.5"], "expected a number of more than 0 and less than 1"),
    (["--grad-accum-steps", "0"], "--grad-accum-steps is '0'; expected a number of at least 1"),
    (["--hflip", "7"], "--hflip is '7'; expected a number of at least 0 and at most 1"),
    (["--lr", "fast"], "--lr is 'fast'; expected a number"),
    (["--lr", "nan"], "--lr is 'nan'; expected a number"),
    (["--batch-size", "2.5"], "--batch-size is '2.5'; expected a whole number"),
    (["--sched", "plateau"], "--sched is 'plateau'; expected one of cosine, tanh, poly, step"),
    (["--model-kwargs", "depth"], r"--model-kwargs is \['depth'\]; expected KEY=VALUE pairs"),
    (["--log-with", "crayon"], "--log-with is 'crayon'; expected one of"),
    (["--log-with", "clearml"], "pip install clearml"),
]


@pytest.mark.parametrize(("options", "message"), DISAGREE)
def test_bad_options_end_in_one_sentence_before_any_work(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        finetune.main([*options, "--cpu", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init-from", "digits", "--model", "jet_tiny"], "decides --model"),
        (["--init-from", "nothing"], "no flow at"),
        (["--decay-ratio", "1.5"], "--decay-ratio is '1.5'; expected a number of more than 0 and at most 1"),
        (["--decay-ratio", "0.5", "--lr-schedule", "halving"], "belongs to --lr-schedule linear"),
        (["--swa-from", "800", "--steps", "800"], "--swa-from 800 is never reached in 800 steps"),
        (["--steps", "0"], "--steps is '0'; expected a number of at least 1"),
    ],
)
def test_a_flow_that_disagrees_with_the_options(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_flow.main([*options, "--cpu", "--output", str(tmp_path / "out")])


BAD_VALUES = [
    (TrainFlowOptions, "opt", "foo"),
    (TrainFlowOptions, "lr_schedule", "foo"),
    (TrainFlowOptions, "estimator", "foo"),
    (TrainFlowOptions, "steps", -5),
    (TrainFlowOptions, "steps", 1.5),
    (TrainFlowOptions, "steps", [1, 2]),
    (TrainFlowOptions, "seed", 1.5),
    (TrainFlowOptions, "save_every", 0),
    (TrainFlowOptions, "dry_run", "no"),
    (TrainFlowOptions, "conditioner_dtype", "int8"),
    (TrainFlowOptions, "model_kwargs", [1]),
    (FinetuneOptions, "scale", 0.5),
    (FinetuneOptions, "scale", [0.5]),
    (FinetuneOptions, "scale", [0.5, 3]),
    (FinetuneOptions, "model_ema", 1),
    (FinetuneOptions, "reprob", 3),
    (FinetuneOptions, "flow_aug_p", True),
]


@pytest.mark.parametrize(("command", "name", "value"), BAD_VALUES)
def test_a_value_in_a_recipe_gets_the_error_of_the_command_line(command, name, value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{command.part}: {{{name}: {value!r}}}")
    with pytest.raises(OptionError) as typed:
        resolve_options(command, {name: value})
    with pytest.raises(ValueError, match="--") as written:
        resolve_options(command, {"recipe": str(recipe)})
    assert str(typed.value).startswith(f"--{name.replace('_', '-')} is {value!r}; expected ")
    assert str(written.value) == f"{typed.value} (recipe {recipe})"


@pytest.mark.parametrize("command", [TrainFlowOptions, FinetuneOptions])
def test_the_command_line_sets_every_option_to_its_default_value(command):
    """What ``--help`` shows as a default means the same when it is typed."""
    parser, defaults = create_parser(command, "prog", None), command().values()
    for group in command.groups().values():
        for item in dataclasses.fields(group):
            value = defaults[item.name]
            words = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            if value not in (None, {}) and not isinstance(value, bool):
                given = vars(parser.parse_args([f"--{item.name.replace('_', '-')}", *words]))
                assert command.from_values(given).values()[item.name] == value


@pytest.mark.parametrize("command", [TrainFlowOptions, FinetuneOptions])
def test_names_are_unique_and_every_option_has_a_help(command):
    names = [item.name for group in command.groups().values() for item in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    for group in command.groups().values():
        assert all(len(item.metadata["help"]) > 2 for item in dataclasses.fields(group))


def test_types_come_from_the_annotation():
    @dataclasses.dataclass(frozen=True)
    class Some(Options):
        """Some."""

        switch: bool | None = option(None, "s")
        pair: tuple[float, float] = option((1.0, 2.0), "p", at_least=0)
        names: tuple[str, ...] | None = option(None, "n")
        table: dict[str, object] = option({}, "t")

    some = Some(pair=["1", "3"], names=["a", "b"], table=["depth=2", "name=x", "sizes=(1, 2)"])
    assert (some.pair, some.names) == ((1.0, 3.0), ("a", "b"))
    assert some.table == {"depth": 2, "name": "x", "sizes": (1, 2)}
    assert Some(switch=False).switch is False
    for bad in ({"switch": "yes"}, {"pair": "12"}, {"pair": [-1, 1]}, {"names": "ab"}, {"table": ["=2"]}):
        with pytest.raises(OptionError):
            Some(**bad)


def test_a_namespace_stays_in_the_command_line():
    options = finetune_options("--lr", "0.5", "--scale", "0.5", "1", "--no-pretrained")
    assert not any(isinstance(value, argparse.Namespace) for value in vars(options).values())
    assert (options.schedule.lr, options.transforms.scale, options.classifier.pretrained) == (0.5, (0.5, 1.0), False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.schedule.lr = 1.0


def test_config_is_another_name_of_recipe():
    for flag in ("-c", "--config", "--recipe"):
        assert finetune_options(flag, "eva02_imagenet").classifier.model.startswith("eva02_base")


@pytest.mark.parametrize(
    ("options", "images", "expected"),
    [
        ([], 2499, True),
        ([], 2500, False),
        (["--flow-aug-per-axis"], 2500, True),
        (["--no-flow-aug-per-axis"], 100, False),
        (["--recipe", "eva02_imagenet"], 100, False),
    ],
)
def test_few_images_per_class_get_one_weight_per_principal_component(options, images, expected):
    chosen = finetune_options("--flow-aug", *options)
    assert mixup_keywords(chosen, {}, images, 10)["per_axis"] == expected
    assert has_few_images(images, 10) == (images < 2500)


def test_settings_stored_with_a_flow_are_before_the_defaults_and_behind_the_command_line():
    stored = {"p": 0.25, "alpha": 0.7, "per_axis": False}
    assert mixup_keywords(finetune_options("--flow-aug"), stored, 10, 10)["alpha"] == 0.7
    given = mixup_keywords(finetune_options("--flow-aug", "--flow-aug-alpha", "2"), stored, 10, 10)
    assert (given["p"], given["alpha"], given["per_axis"], given["rescaled"]) == (0.25, 2.0, False, True)


def test_data_of_the_command_line_replace_those_of_the_recipe():
    for recipe in ("few_images_fashion_mnist", "default", "digits"):
        for quick in ([], ["--quick"]):
            options = finetune_options("--recipe", recipe, "--data-dir", "photos", *quick)
            assert options.data == DataOptions(data_dir="photos")
    assert finetune_options("--recipe", "default", "--quick", "--data-dir", "photos").flow_aug.flow_aug == "auto"
    assert finetune_options("--recipe", "default", "--quick").flow_aug.flow_aug == "digits"


def test_a_folder_completes_a_recipe_whose_data_set_needs_one(tmp_path):
    assert finetune_options("--recipe", "swin_cifar10", "--data-dir", "data").data.dataset == "torch/cifar10"
    (tmp_path / "train").mkdir()
    assert finetune_options("--recipe", "swin_cifar10", "--data-dir", str(tmp_path)).data.dataset is None


def test_the_flow_of_a_recipe_can_be_changed_and_switched_off():
    recipe = ["--recipe", "eva02_imagenet"]
    assert finetune_options(*recipe, "--flow-aug-p", "0.3").flow_aug.flow_aug_p == 0.3
    assert finetune_options(*recipe).flow_aug.flow_aug == "runs/imagenet_flow"
    assert finetune_options(*recipe, "--no-flow-aug").flow_aug.flow_aug is None


def test_conflicts_are_found_after_the_merge(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("classifier: {flow_aug: digits, flow_aug_off_epoch: 2}")
    with pytest.raises(ValueError, match="--flow-aug-off-epoch cannot apply"):
        finetune_options("--recipe", str(recipe), "--flow-aug-copies", "2")


def test_the_flow_of_a_classifiers_recipe_is_trained_by_that_of_its_data_set():
    """A recipe without options of a flow uses the recipe of its own data set, not that of the digits."""
    flow = flow_options("--recipe", "efficientnet_lite0_fashion_mnist", "--dataset", "fashion_mnist")
    assert flow.flow.image_size == 28
    assert flow_options("--recipe", "efficientnet_lite0_fashion_mnist").flow.image_size == 28
