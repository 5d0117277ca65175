"""Every recipe is a whole document, and its quick mode runs here."""

import json

import pytest

from flowaug.training import finetune, train_flow
from flowaug.training.options import FinetuneOptions, TrainFlowOptions
from flowaug.training.options.recipes import FOLDER, PARTS, WORDS, list_recipes, load_recipe, resolve_options
from tests.conftest import finetune_options, flow_options

RECIPES = list_recipes()
COMMANDS = {"flow": TrainFlowOptions, "classifier": FinetuneOptions}
MAINS = {"flow": train_flow.main, "classifier": finetune.main}
NAMED = [(name, part) for name in RECIPES for part in PARTS if part in load_recipe(name)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_describes_itself_and_has_a_quick_mode(name):
    recipe = load_recipe(name)
    assert set(WORDS) <= set(recipe)
    assert set(recipe["quick"]) == set(recipe) & set(PARTS)
    assert "flowaug finetune" in recipe["command"]


@pytest.mark.parametrize(("name", "part"), NAMED)
def test_every_option_reaches_its_command(name, part):
    recipe = load_recipe(name)
    whole = resolve_options(COMMANDS[part], {"recipe": name}).hashable_options()
    quick = resolve_options(COMMANDS[part], {"recipe": name, "quick": True}).hashable_options()
    assert {key: whole[key] for key in recipe[part]} == recipe[part]
    assert {key: quick[key] for key in recipe["quick"][part] if key in quick} == {
        key: value for key, value in recipe["quick"][part].items() if key in quick
    }
    assert quick["dataset"] == "digits"


@pytest.mark.parametrize("name", RECIPES)
def test_the_quick_mode_has_a_plan(name, tmp_path, capsys):
    for part in load_recipe(name)["quick"]:
        MAINS[part](["--recipe", name, "--quick", "--dry-run", "--cpu", "--output", str(tmp_path / "out")])
    assert "digits:" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_quick_mode_runs_with_flow_augmentation(tmp_path):
    options = ["--recipe", "efficientnet_lite0_fashion_mnist", "--quick", "--flow-aug", "digits", "--workers", "0"]
    finetune.main([*options, "--cpu", "--output", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["steps"], metrics["images"]) == (4, 359)
    assert metrics["flow_aug"]["augmented"] > 0


def test_a_recipe_is_found_by_its_name_or_its_path():
    paths = ("eva02_imagenet", "recipes/eva02_imagenet.yaml", FOLDER / "eva02_imagenet.yaml")
    assert all(load_recipe(path) == load_recipe(paths[0]) for path in paths)


def test_the_command_line_goes_before_the_recipe():
    options = ["--recipe", "eva02_imagenet", "--lr", "3", "--steps", "7", "--data-dir", "photos"]
    chosen = finetune_options(*options)
    assert (chosen.schedule.lr, chosen.training.steps, chosen.training.epochs) == (3, 7, None)
    assert (chosen.training.epoch_repeats, chosen.data.dataset) == (3, None)
    other = finetune_options(*options, "--model", "resnet18").classifier
    assert (other.pretrained, other.model) == (None, "resnet18")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flow: {step: 3}", "unknown option 'step'"),
        ("flow: {posterior_weight: 1, teacher: runs/a}", "--teacher is 'runs/a'; expected one or more values"),
        ("flow: {model_kwargs: hidden=8}", "expected KEY=VALUE pairs, in a recipe {key: value, …}"),
        ("flow: {posterior_weight: -1}", "--posterior-weight is -1"),
        ("flows: {steps: 3}", "is no recipe"),
        ("flow: abc", "is no recipe: flow is 'abc'; expected a mapping of options"),
        ("flow: [a]", "expected a mapping of options"),
        ("quick: 5", "is no recipe: quick is 5"),
        ("flow: [", "not valid YAML"),
        ("- a", "is no recipe"),
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
    gaussians = flow_options("--recipe", str(path), "--teacher", "runs/a", "runs/b").gaussians
    assert (gaussians.posterior_weight, gaussians.teacher) == (2.0, ("runs/a", "runs/b"))


def test_options_that_a_recipe_leaves_out_have_their_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("classifier: {model: test_resnet, pretrained: false, steps: 3, lr: 2.0}")
    chosen, default = finetune_options("--recipe", str(path)), FinetuneOptions()
    assert (chosen.schedule.lr, chosen.training.steps, chosen.training.epochs) == (2.0, 3, None)
    assert (chosen.training.opt, chosen.training.batch_size) == (default.training.opt, default.training.batch_size)
    assert chosen.transforms == default.transforms


def test_quick_goes_before_the_recipe_and_a_later_length_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("classifier: {epochs: 5, seed: 5}\nquick: {classifier: {steps: 2, seed: 9}}")
    for extra, expected in (([], (5, None, 5)), (["--seed", "2"], (5, None, 2)), (["--quick"], (None, 2, 9))):
        training = finetune_options("--recipe", str(path), *extra).training
        assert (training.epochs, training.steps, training.seed) == expected
