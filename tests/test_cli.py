import json

import pytest
from PIL import Image

from flowaug import cli


def test_list(capsys):
    cli.main(["list"])
    assert capsys.readouterr().out.startswith("digits: mef_tiny, 10 classes")


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
    assert "oracle accuracy" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "labels.json").read_text())
    assert report["images"] == 40
    assert [row["weight"] for row in report["weights"]] == [0, 0.5]
    assert report["weights"][0]["accuracy"] == report["original"]["accuracy"]
    assert (tmp_path / "report" / "labels.png").is_file()
    assert len(list((tmp_path / "oracles").iterdir())) == 1


def test_export_and_go_on(tmp_path, capsys):
    options = ["export", "--split", "val", "--output", str(tmp_path)]
    cli.main(options)
    assert "359 images written, 0 there before" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 359
    next(tmp_path.rglob("*.png")).unlink()
    cli.main(options)
    assert "1 images written, 358 there before" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"flowaug: .* holds another export: its alpha is 1.0, not 0.5"):
        cli.main([*options, "--alpha", "0.5"])


BAD = [
    (["preview", "nowhere"], "no flow at 'nowhere'"),
    (["evaluate", "--split", "train"], "judge --split val"),
    (["evaluate", "--oracle-checkpoint", "model.pth"], "needs --oracle"),
    (["export", "--dataset", "fashion-mnist"], "did you mean 'fashion_mnist'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_command(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([*options, "--output", str(tmp_path)])
