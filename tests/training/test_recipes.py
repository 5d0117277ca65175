"""Every recipe is a whole document, and its quick mode runs here."""

import argparse
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from flowaug.training import finetune, train_flow
from flowaug.training.recipes import FOLDER, WORDS, deciding_options, load_recipe, parse_with_recipe

RECIPES = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = {"flow": train_flow, "classifier": finetune}
PARTS = [(path, part) for path in RECIPES for part in SCRIPTS if part in load_recipe(path)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_has_a_quick_mode(path):
    recipe = load_recipe(path)
    assert set(WORDS) <= set(recipe)
    assert set(recipe["quick"]) == set(recipe) & set(SCRIPTS)
    assert "finetune.py" in recipe["command"]


@pytest.mark.parametrize(("path", "part"), PARTS, ids=lambda value: getattr(value, "stem", value))
def test_every_option_reaches_its_script(path, part):
    recipe = load_recipe(path)
    whole, quick = (SCRIPTS[part].parse_args(["--recipe", str(path), *extra]) for extra in ([], ["--quick"]))
    for name, value in recipe[part].items():
        assert getattr(whole, name) == value
    for name, value in recipe["quick"][part].items():
        assert getattr(quick, name) == value
    assert quick.dataset == "digits"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_quick_mode_has_a_plan(path, tmp_path, capsys):
    for part in load_recipe(path)["quick"]:
        SCRIPTS[part].main(["--recipe", str(path), "--quick", "--dry-run", "--cpu", "--output", str(tmp_path / "out")])
    assert "digits:" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_quick_mode_runs_with_flow_augmentation(tmp_path):
    recipe = str(FOLDER / "efficientnet_lite0_fashion_mnist.yaml")
    finetune.main(["--recipe", recipe, "--quick", "--flow-aug", "digits", "--cpu", "--output", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["images"]) == (4, 359)
    assert metrics["flow_aug"]["augmented"] > 0


def test_the_command_line_goes_before_the_recipe():
    options = ["--recipe", str(FOLDER / "eva02_imagenet.yaml"), "--lr", "3", "--steps", "7", "--data-dir", "photos"]
    args = finetune.parse_args(options)
    assert (args.lr, args.steps, args.epochs, args.dataset_copies, args.dataset) == (3, 7, None, 3, None)
    other = finetune.parse_args([*options, "--model", "resnet18"])
    assert (other.pretrained, other.model) == (None, "resnet18")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flow: {step: 3}", r"unknown options: \['step'\]"),
        ("flow: {posterior_weight: 1, teacher: runs/a}", "gives teacher the one value 'runs/a'; it takes several"),
        ("flow: {model_kwargs: hidden=8}", "it takes several: model_kwargs: {key: value, …}"),
        ("flow: {posterior_weight: -1}", "--posterior-weight is -1"),
        ("flows: {steps: 3}", "is no recipe"),
        ("flow: [", "not valid YAML"),
        (None, "no recipe at"),
    ],
)
def test_a_bad_recipe_ends_in_one_sentence(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        train_flow.main(["--recipe", str(path), "--cpu", "--output", str(tmp_path / "out")])


def test_a_recipe_may_give_what_an_option_needs(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("flow: {posterior_weight: 2.0}")
    args = train_flow.parse_args(["--recipe", str(path), "--teacher", "runs/a", "runs/b"])
    assert (args.posterior_weight, args.teacher) == (2.0, ["runs/a", "runs/b"])


def test_what_a_recipe_leaves_out_comes_from_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("classifier: {model: test_resnet, pretrained: false, steps: 3, lr: 2.0}")
    args = finetune.parse_args(["--recipe", str(path)])
    default = load_recipe(FOLDER / "default.yaml")["classifier"]
    assert (args.lr, args.steps, args.epochs, args.flow_aug_p) == (2.0, 3, None, default["flow_aug_p"])
    assert (args.opt, args.weight_decay, args.batch_size) == tuple(
        default[name] for name in ("opt", "weight_decay", "batch_size")
    )


def test_a_recipe_may_set_what_has_a_default(tmp_path):
    parser = argparse.ArgumentParser()
    for name in load_recipe(FOLDER / "default.yaml")["flow"]:
        parser.add_argument(f"--{name}")
    for name in ("--recipe", "--dataset", "--data-dir"):
        parser.add_argument(name, type=Path if name == "--recipe" else str)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--speed", type=int, default=1)
    path = tmp_path / "recipe.yaml"
    path.write_text("flow: {speed: 5}\nquick: {flow: {speed: 9}}")
    speeds = [
        parse_with_recipe(parser, ["--recipe", str(path), *extra], "flow", lambda given, recipe: recipe).speed
        for extra in ([], ["--speed", "2"], ["--quick"])
    ]
    assert speeds == [5, 2, 9]


def test_the_recipe_of_few_images_is_what_was_measured(monkeypatch):
    benchmarks = FOLDER.parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(benchmarks)
    arms, recipe = importlib.import_module("gain_arms"), ["--recipe", str(FOLDER / "few_images_fashion_mnist.yaml")]
    setup = replace(arms.FULL, settings=json.loads((benchmarks / "tuning.json").read_text()))
    cell = arms.Cell("lite0", "20", "axes+standard", seed=0)
    pairs = [
        (train_flow.parse_args(recipe), train_flow.parse_args(arms.flow_options(cell, setup)), {"eval_every"}),
        (finetune.parse_args(recipe), arms.options_of(cell, setup), {"dataset", "images_per_class"}),
    ]
    for ours, measured, apart in pairs:
        ours, measured = (deciding_options(options, ()) for options in (ours, measured))
        others = {name for name in ours if ours[name] != measured[name] and not name.startswith("flow_aug")}
        assert others == apart
    axes = setup.settings["flow"] | setup.settings["axes"]
    assert (ours["flow_aug_p"], ours["flow_aug_alpha"]) == (axes["p"], axes["alpha"])
    assert (ours["flow_aug_per_axis"], ours["flow_aug_rescaled"]) == (axes["per_axis"], axes["rescaled"])
    assert ours["flow_aug_copies"] == ours["steps"] * ours["batch_size"] // (10 * ours["images_per_class"])
