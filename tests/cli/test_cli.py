import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import flowaug
from flowaug.cli import main as cli
from flowaug.data import load_dataset


def test_list(capsys):
    cli.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits: mef_tiny, 10 classes")
    assert lines[-1].startswith("recipes: default, digits, ")


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"flowaug {flowaug.__version__}\n"


def test_training_commands_run_and_are_listed(tmp_path, capsys):
    for command in ("train-flow", "finetune"):
        cli.main([command, "--dry-run", "--cpu", "--output", str(tmp_path / "out")])
        assert "digits: 1438 training" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("train-flow", "finetune", "preview", "generate"))


def test_python_m_flowaug_is_the_command():
    run = subprocess.run([sys.executable, "-m", "flowaug", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"flowaug {flowaug.__version__}\n"


def test_preview(tmp_path, capsys):
    cli.main(["preview", "--output", str(tmp_path / "grid.png"), "--classes", "3"])
    assert "3 images" in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 200


def test_evaluate(tmp_path, capsys):
    options = [
        "--max-images",
        "40",
        "--oracle-steps",
        "4",
        "--weights",
        "0",
        "0.5",
        "--output",
        str(tmp_path / "report"),
    ]
    cli.main(["evaluate", *options])
    assert "accuracy of the reference classifier" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "labels.json").read_text())
    assert report["images"] == 40
    assert [row["weight"] for row in report["weights"]] == [0, 0.5]
    assert report["weights"][0]["accuracy"] == report["original"]["accuracy"]
    assert (tmp_path / "report" / "labels.png").is_file()
    assert len(list((tmp_path / "oracles").iterdir())) == 1


def test_export_and_go_on(tmp_path, capsys):
    options = ["export", "--split", "val", "--output", str(tmp_path)]
    cli.main(options)
    assert "359 images written, 0 were there already" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 359
    next(tmp_path.rglob("*.png")).unlink()
    cli.main(options)
    assert "1 images written, 358 were there already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"flowaug: .* holds another export: its alpha is 0.3, not 0.5"):
        cli.main([*options, "--alpha", "0.5"])
    with pytest.raises(SystemExit, match=r"its per_axis is True, not False"):
        cli.main([*options, "--no-per-axis"])


def test_sample(tmp_path, capsys):
    path = tmp_path / "grid.png"
    options = ["sample", "--per-class", "3", "--classes", "4", "--output", str(path)]
    cli.main([*options, "--temperature", "0.5", "--seed", "2"])
    assert "3 samples of each of 4 classes at temperature 0.5" in capsys.readouterr().out
    facts = json.loads(path.with_suffix(".json").read_text())
    named = ("flow", "temperature", "seed", "classes", "per_class", "rfcm")
    assert [facts[name] for name in named] == ["digits", 0.5, 2, ["0", "1", "2", "3"], 3, False]
    first = path.read_bytes()
    for more, same in (([], True), (["--rfcm"], False)):
        cli.main([*options, "--temperature", "0.5", "--seed", "2", *more])
        assert (path.read_bytes() == first) == same
    assert json.loads(path.with_suffix(".json").read_text())["rfcm"]


@pytest.mark.parametrize("more", [["--path", "rescaled"], ["--path", "spherical", "--across"]])
def test_interpolate(tmp_path, capsys, more):
    path = tmp_path / "walks.png"
    cli.main(["interpolate", "--pairs", "4", "--steps", "5", "--output", str(path), *more])
    assert f"4 {more[1]} interpolations" in capsys.readouterr().out
    facts = json.loads(path.with_suffix(".json").read_text())
    assert [a != b for a, b in facts["labels"]] == ["--across" in more] * 4
    targets = load_dataset("digits", split="val").targets
    assert targets[np.array(facts["images"])].tolist() == facts["labels"]
    with Image.open(path) as image:
        assert image.width > 300


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_map(tmp_path, capsys, method):
    path = tmp_path / "map.png"
    cli.main(["map", "--method", method, "--max-images", "50", "--output", str(path)])
    assert f"latents of 50 images of 10 classes by {method}" in capsys.readouterr().out
    facts = json.loads(path.with_suffix(".json").read_text())
    assert np.array(facts["coordinates"]).shape == (50, 2)
    assert len(facts["labels"]) == 50
    assert path.is_file()


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_generate_and_go_on(tmp_path, capsys, layout):
    options = ["generate", "--per-class", "3", "--format", layout, "--output", str(tmp_path)]
    cli.main([*options, "--rfcm"])
    assert "30 images written, 0 were there already" in capsys.readouterr().out
    victim = next(p for p in sorted(tmp_path.rglob("*")) if p.suffix in (".png", ".tar"))
    whole = victim.read_bytes()
    victim.unlink()
    cli.main([*options, "--rfcm"])
    assert "29 were there already" in capsys.readouterr().out or layout == "webdataset"
    assert victim.read_bytes() == whole
    with pytest.raises(SystemExit, match=r"flowaug: .* holds another export: its rfcm is True, not False"):
        cli.main(options)


def test_generated_images_load_as_a_data_set(tmp_path):
    cli.main(["generate", "--per-class", "2", "--output", str(tmp_path)])
    data = load_dataset(data_dir=tmp_path)
    assert (data.class_names, len(data), data.channels) == (tuple("0123456789"), 20, 1)


@pytest.mark.parametrize("command", ["sample", "interpolate", "map", "generate"])
def test_help_teaches_with_an_example_that_parses(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    example = text.split("example: flowaug ")[1].split()
    assert vars(cli.create_parser().parse_args(example))["command"] == command
    assert len(text.split("positional")[0].splitlines()) > 8


TYPED = [
    (["sample", "--per-class", "0"], "argument --per-class: '0' is not a whole number of at least 1"),
    (["sample", "--output", "grid.jpg"], "argument --output: 'grid.jpg' does not end in .png"),
    (["generate", "--temperature", "-1"], "argument --temperature: '-1' is not a number of at least 0"),
    (["generate", "--temperature", "nan"], "is not a number of at least 0"),
    (["interpolate", "--steps", "1"], "argument --steps: '1' is not a whole number of at least 2"),
    (["map", "--max-images", "many"], "argument --max-images: 'many' is not a whole number of at least 4"),
]


@pytest.mark.parametrize(("options", "message"), TYPED)
def test_bad_option(capsys, options, message):
    with pytest.raises(SystemExit):
        cli.main(options)
    assert message in capsys.readouterr().err


def test_data_without_rfcm(tmp_path):
    with pytest.raises(SystemExit, match="name the data whose latents --rfcm uses; add --rfcm"):
        cli.main(["sample", "--dataset", "digits", "--output", str(tmp_path / "a.png")])


BAD = [
    (["generate", "nowhere"], "no flow at 'nowhere'"),
    (["preview", "nowhere", "--output", "grid.png"], "no flow at 'nowhere'"),
    (["evaluate", "--split", "train"], "use --split val or --oracle"),
    (["evaluate", "--oracle-checkpoint", "model.pth"], "needs --oracle"),
    (["export", "--dataset", "fashion-mnist"], "did you mean 'fashion_mnist'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_command(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([*options, *([] if "--output" in options else ["--output", str(tmp_path)])])
