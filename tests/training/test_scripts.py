"""The scripts as a user runs them, on a data set small enough for a test."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from flowaug import FlowMixupTransform, list_pretrained, load_flow, load_pca
from flowaug.data import load_dataset, stack_images
from flowaug.evaluation.oracle import load_teacher
from flowaug.flows.checkpoint import CONFIG, WEIGHTS, find_flow
from flowaug.training import finetune, flow_source, train_flow
from flowaug.training import resume as state
from flowaug.training.options import FlowTrainingOptions
from tests.conftest import finetune_options, write_photos

ROOT = Path(__file__).resolve().parents[2]
QUICK_FLOW = [
    "--workers",
    "0",
    "--steps",
    "6",
    "--solve-at",
    "3",
    "--eval-every",
    "3",
    "--batch-size",
    "16",
    "--rank",
    "3",
    "--cpu",
]
QUICK = [
    "--workers",
    "0",
    "--steps",
    "4",
    "--batch-size",
    "16",
    "--model",
    "test_resnet",
    "--no-pretrained",
    "--img-size",
    "32",
    "--cpu",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of RGB images of mixed sizes."""
    return write_photos(tmp_path_factory.mktemp("photos"), ("ant", "bee", "cat"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A flow trained for a few steps on the photos."""
    output = tmp_path_factory.mktemp("runs") / "flow"
    options = ["--model", "mef_tiny", "--image-size", "8", "--output", str(output), *QUICK_FLOW]
    train_flow.main(["--data-dir", str(photos), *options])
    return output


def test_train_flow_writes_a_whole_folder(trained):
    names = {"config.json", "model.safetensors", "pca.safetensors", "metrics.json", "samples.png", "augmented.png"}
    names |= {"README.md", "metrics.jsonl", "curves.png", "moments.safetensors", "run.json"}
    assert names == {p.name for p in trained.iterdir()}
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["class_gaussians"]["converged"]
    assert 0 <= metrics["nf_acc"] <= 1
    assert metrics["step"] == 6
    flow = load_flow(trained)
    assert flow.class_names == ("ant", "bee", "cat")
    assert flow.gaussians.mean.abs().sum() > 0
    assert load_pca(trained).coords.shape == (24, 3)
    with Image.open(trained / "augmented.png") as image:
        assert image.width > 200


def test_same_seed_same_flow(photos, trained, tmp_path):
    options = ["--model", "mef_tiny", "--image-size", "8", "--output", str(tmp_path / "again"), *QUICK_FLOW]
    train_flow.main(["--data-dir", str(photos), *options])
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()


def test_a_killed_run_resumes_to_the_same_weights(photos, trained, tmp_path, killed_at):
    options = ["--data-dir", str(photos), "--model", "mef_tiny", "--image-size", "8", "--save-every", "1", *QUICK_FLOW]
    options += ["--output", str(tmp_path / "cut")]
    saved = killed_at(4, train_flow.main, options)
    train_flow.main(options)
    assert saved == [1, 2, 3, 4, 5, 6]  # the second run went on from step 4
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert not (tmp_path / "cut" / "state.safetensors").exists()


@pytest.mark.parametrize("script", [train_flow, finetune])
def test_two_runs_cannot_write_to_one_folder(photos, tmp_path, script, monkeypatch):
    monkeypatch.setattr(state, "LOCK_TIMEOUT_S", 0)
    output, quick = tmp_path / "out", {train_flow: QUICK_FLOW, finetune: QUICK}[script]
    with state.exclusive_folder(output):
        with pytest.raises(SystemExit, match=r"another run is writing to .*out; .* another --output"):
            script.main(["--data-dir", str(photos), *quick, "--output", str(output)])
        with state.exclusive_folder(output, main=False):  # another process of the same run
            assert [p.name for p in output.iterdir()] == [".lock"]
    with pytest.raises(RuntimeError, match="broken"), state.exclusive_folder(output):
        raise RuntimeError("broken")
    with state.exclusive_folder(output):  # free again
        pass


def test_finetune_on_a_folder_with_a_named_flow(photos, trained, tmp_path, capsys):
    output = tmp_path / "out"
    finetune.main(["--data-dir", str(photos), "--flow-aug", str(trained), "--output", str(output), *QUICK])
    assert "validation accuracy" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert metrics["flow_aug"]["augmented"] > 0
    assert {"model.safetensors", "augmented.png", "curves.png", "metrics.jsonl"} <= {p.name for p in output.iterdir()}


def test_timm_and_teachers_are_loaded_from_the_folder_of_finetune(tmp_path):
    output, shape = tmp_path / "out", ["--model", "resnet10t", "--model-kwargs", "channels=(4,6,8,10)"]
    finetune.main([*QUICK, *shape, "--steps", "20", "--output", str(output)])
    data = load_dataset("digits", split="val")
    teacher, model = load_teacher(str(output), data), timm.create_model(f"local-dir:{output}", pretrained=True)
    images, targets = data.read_table((8, 8), data.channels)
    top1 = (teacher(images.float() / 255) == targets).double().mean().item()
    assert top1 == pytest.approx(json.loads((output / "metrics.json").read_text())["top1"], abs=0.02)  # resized by PIL
    assert all(torch.equal(model.state_dict()[k], v) for k, v in teacher.model.state_dict().items())
    weights, config = (output / "model.safetensors").read_bytes(), json.loads((output / "config.json").read_text())
    (output / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(output), data)
    (output / "model.safetensors").write_bytes(weights)
    config["label_names"] = config["label_names"][::-1]
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="class order differs"):
        load_teacher(str(output), data)


def test_options_of_the_mixture_reach_the_transform():
    options = ["--flow-aug", "digits", "--flow-aug-p", "1", "--flow-aug-rank", "8", "--cpu"]
    plans = []
    for more in (
        ["--no-flow-aug-per-axis", "--no-flow-aug-rescaled"],
        ["--flow-aug-per-axis", "--flow-aug-rescaled", "--flow-aug-redraws", "2"],
        [],
    ):
        chosen = finetune_options(*options, *more)
        flow_mixup = flow_source.load_flow_mixup(chosen, load_dataset("digits"), Accelerator(cpu=True))
        plans.append(flow_mixup.plan(torch.zeros(5).long()))
    assert [plan.rescaled for plan in plans] == [False, True, True]
    assert [len(plan.redraws) for plan in plans] == [0, 2, 0]
    assert [len(plan.weight[0].unique()) for plan in plans] == [1, 8, 8]  # the last is that of few images


def test_a_killed_finetune_resumes_to_the_same_weights(photos, trained, tmp_path, killed_at):
    extras = ["--flow-aug", str(trained), "--mixup", "0.2", "--reprob", "0.5", "--hflip", "0.5", "--save-every", "1"]
    options = ["--data-dir", str(photos), *extras, *QUICK, "--steps", "5", "--batch-size", "10"]  # two steps an epoch
    finetune.main([*options, "--output", str(tmp_path / "whole")])
    assert killed_at(3, finetune.main, [*options, "--output", str(tmp_path / "cut")]) == [1, 2, 3]
    leftover = tmp_path / "cut" / ".state.safetensors.0123456789abcdef.tmp"
    leftover.write_bytes(b"half")  # as a kill in the middle of writing leaves
    finetune.main([*options, "--workers", "1", "--output", str(tmp_path / "cut")])
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    counts = [json.loads((tmp_path / run / "metrics.json").read_text())["flow_aug"] for run in ("cut", "whole")]
    assert counts[0] == counts[1]
    assert not [p.name for p in (tmp_path / "cut").iterdir() if "state" in p.name]


def test_finetune_trains_a_missing_flow_once_and_keeps_it(photos, tmp_path, capsys):
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("flow: {model: mef_tiny, image_size: 8, steps: 4, solve_at: 2, rank: 2, batch_size: 16}")
    options = ["--recipe", str(recipe), "--data-dir", str(photos), "--flow-aug", *QUICK]
    finetune.main([*options, "--output", str(tmp_path / "a")])
    assert "training one first" in capsys.readouterr().out
    finetune.main([*options, "--output", str(tmp_path / "b")])
    assert "trained for this data set earlier" in capsys.readouterr().out
    assert len(list((tmp_path / "flows").iterdir())) == 1


def test_finetune_runs_every_augmentation_together(tmp_path):
    extras = [
        "--aa",
        "rand-m9-mstd0.5-inc1",
        "--reprob",
        "0.5",
        "--mixup",
        "0.2",
        "--cutmix",
        "1.0",
        "--smoothing",
        "0.1",
    ]
    finetune.main(["--flow-aug", "digits", *extras, "--output", str(tmp_path), *QUICK])
    counts = json.loads((tmp_path / "metrics.json").read_text())["flow_aug"]
    assert counts["augmented"] > counts["rejected"]  # RandAugment inverts some digits: the flow has seen none such


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the precision of a process; a test that changes it starts and leaves with none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_finetune_runs_every_training_option_together(photos, trained, tmp_path):
    (tmp_path / "policy.json").write_text(json.dumps({"bee": {"p": 0.0}}))
    extras = ["--flow-aug", str(trained), "--flow-aug-policy", str(tmp_path / "policy.json"), "--flow-aug-p", "1"]
    extras += ["--flow-aug-off-epoch", "2", "--cutmix", "1", "--mixup-off-epoch", "3", "--epoch-repeats", "2"]
    extras += ["--opt", "sgd", "--lr-cycles", "2", "--layer-decay", "0.8", "--grad-accum-steps", "2", "--model-ema"]
    extras += ["--amp", "bf16", "--channels-last", "--drop-path", "0.1", "--epochs", "4", "--batch-size", "12"]
    quick = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--cpu"]
    finetune.main(["--data-dir", str(photos), *extras, *quick, "--output", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 8  # 24 images twice an epoch, 2 × 12 a step
    assert metrics["flow_aug"]["seen"] == 2 * 48  # off from the third epoch on
    assert 0 < metrics["flow_aug"]["augmented"] < 2 * 48  # never a bee


def test_accumulated_gradients_are_those_of_the_whole_batch(photos, tmp_path):
    options = ["--data-dir", str(photos), *QUICK, "--model", "test_vit", "--opt", "sgd", "--hflip", "0"]
    options += ["--scale", "1", "1", "--ratio", "1", "1", "--steps", "2"]
    finetune.main([*options, "--batch-size", "12", "--output", str(tmp_path / "whole")])
    finetune.main([*options, "--batch-size", "4", "--grad-accum-steps", "3", "--output", str(tmp_path / "parts")])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_flow_trains_on_crops_of_timm_in_few_bits(photos, tmp_path, killed_at):
    options = ["--data-dir", str(photos), "--model", "mef_tiny", "--image-size", "8", *QUICK_FLOW, "--bits", "5"]
    options += ["--scale", "0.5", "1", "--aa", "rand-m5-inc1", "--hflip", "0.5", "--lr-schedule", "halving"]
    options += ["--swa-from", "4", "--save-every", "1", "--model-kwargs", "hidden=8"]
    train_flow.main([*options, "--output", str(tmp_path / "whole")])
    killed_at(3, train_flow.main, [*options, "--output", str(tmp_path / "cut")])
    train_flow.main([*options, "--output", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    flow = load_flow(tmp_path / "whole")
    assert flow.grey_levels == 32
    assert flow.config["overrides"] == {"coupling": "affine", "hidden": 8}


def test_rates_of_a_flow():
    def rates(steps, **options):
        training = FlowTrainingOptions(lr=8, steps=30, warmup_steps=2, **options)
        return [train_flow.learning_rate(step, training) for step in steps]

    assert rates((0, 1, 17, 18, 24, 29)) == pytest.approx([4, 8, 8, 8, 4, 8 / 12])
    assert rates((0, 1, 15), decay_ratio=1.0) == pytest.approx([4, 8 * 29 / 30, 4])
    assert rates((0, 9, 10, 19, 20, 29), lr_schedule="halving") == [4, 8, 4, 4, 2, 2]


def test_compile_options_compile_in_place(photos, trained, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    train_flow.main(["--torchcompile", *QUICK_FLOW, "--output", str(tmp_path / "flow")])
    finetune.main(["--torchcompile", *QUICK, "--output", str(tmp_path / "out")])
    assert set(compiled) == {"Coupling", "ResNet"}
    assert all("_orig_mod" not in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_preview(tmp_path):
    from flowaug.cli.main import main

    main(["preview", "digits", "--output", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height > 400


def test_bundled_flow_classifies_and_round_trips():
    val = load_dataset("digits", split="val")
    flow, x = load_flow("digits"), stack_images(val, (8, 8), 1).float() / 255
    with torch.no_grad():
        z, _ = flow.encode(x)
        accuracy = (flow.log_joint(x).argmax(1).numpy() == val.targets).mean()
        assert (flow.decode(z) - x).abs().max() <= 1e-5
    assert accuracy >= 0.97
    transform = FlowMixupTransform.from_pretrained("digits", p=1.0)
    transform(x, torch.as_tensor(val.targets))
    assert transform.counts["augmented"] >= 0.99 * len(x)


def test_bundled_flow_of_fashion_mnist_classifies_and_round_trips():
    try:
        val = load_dataset("fashion_mnist", split="val").subset(np.arange(500))
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not installed")
    flow, x = load_flow("fashion_mnist"), stack_images(val, (28, 28), 1).float() / 255
    with torch.no_grad():
        z, _ = flow.encode(x)
        assert (flow.gaussians.log_joint(z).argmax(1).numpy() == val.targets).mean() >= 0.88
        assert (flow.decode(z) - x).abs().max() <= 1e-4
    assert flow.class_names == val.class_names


@pytest.mark.parametrize("name", list_pretrained())
def test_bundled_files_stay_small(name):
    sizes = [path.stat().st_size for path in find_flow(name).iterdir()]
    assert max(sizes) <= 8e6


def unreadable(root):
    (root / "train" / "bee" / "0.png").write_bytes(b"no image")


def empty(root):
    for path in (root / "train" / "bee").iterdir():
        path.unlink()


def single(root):
    for path in list((root / "train" / "bee").iterdir())[1:]:
        path.unlink()


def other_classes(root):
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "bug")


BAD_FOLDERS = [
    (unreadable, [], "0.png"),
    (empty, [], "bee"),
    (single, [], "bee"),
    (lambda root: None, ["--images-per-class", "9"], "images_per_class is 9 but class"),
    (other_classes, ["--flow-aug", "{flow}"], "'bug' in the data set but 'bee' in the flow"),
    (lambda root: None, ["--flow-aug", "digits"], "10 classes but the data set has 3"),
    (lambda root: None, ["--flow-aug", "{root}/nothing"], "no flow at"),
    (lambda root: None, ["--model", "resnet_18"], "timm has no model 'resnet_18'"),
]


@pytest.mark.parametrize(("damage", "options", "message"), BAD_FOLDERS)
def test_bad_input_ends_in_one_sentence_before_training(photos, trained, tmp_path, damage, options, message):
    import shutil

    root = shutil.copytree(photos, tmp_path / "photos")
    damage(root)
    options = [o.format(flow=trained, root=root) for o in options]
    with pytest.raises(SystemExit) as caught:
        finetune.main(["--data-dir", str(root), *QUICK, *options, "--output", str(tmp_path / "out")])
    assert message in str(caught.value.code)
    assert not (tmp_path / "out").exists()


def test_truncated_weights_end_in_one_sentence(photos, trained, tmp_path):
    import shutil

    flow = shutil.copytree(trained, tmp_path / "flow")
    (flow / WEIGHTS).write_bytes((flow / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(SystemExit, match="truncated, damaged or from another save"):
        finetune.main(["--data-dir", str(photos), "--flow-aug", str(flow), *QUICK, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("script", ["train_flow.py", "finetune.py"])
def test_help_teaches(script):
    result = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    assert "--dataset" in result.stdout
    assert "accelerate launch" in result.stdout


def test_config_names_the_data_and_the_recipe(trained):
    config = json.loads((trained / CONFIG).read_text())
    assert config["recipe"]["steps"] == 6
    assert len(config["data"]) == 16


@pytest.mark.slow
def test_eva02_takes_real_steps_at_448_pixels(photos, trained, tmp_path):
    options = ["--model", "eva02_base_patch14_448", "--no-pretrained", "--data-dir", str(photos), "--cpu"]
    options += ["--flow-aug", str(trained), "--flow-aug-p", "1", "--steps", "2", "--batch-size", "2", "--opt", "sgd"]
    finetune.main([*options, "--output", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["flow_aug"]["seen"] == 4
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak < 24  # GiB
