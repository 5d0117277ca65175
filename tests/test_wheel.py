"""The wheel is the whole product: built, installed outside of the checkout, and used from there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flowaug

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "flowaug" / "recipes").glob("*.yaml"))
QUICK_RECIPES = """
import sys
from flowaug.cli.main import main
for name in sys.argv[1:]:
    main(["finetune", "--recipe", name, "--quick", "--cpu", "--workers", "0", "--output", f"runs/{name}"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "flowaug", source / "flowaug", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run_pip("wheel", str(source), "--no-deps", "-w", str(output))
    return next(output.glob("flowaug-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Install the wheel into a folder of its own; what it depends on is that of the tests' environment."""
    folder = tmp_path_factory.mktemp("installed")
    run_pip("install", "--no-deps", "--target", str(folder / "site"), str(wheel))
    return folder


def run_pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True, capture_output=True)


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def program(folder):
    return str(folder / "site" / "bin" / "flowaug")


def test_the_wheel_holds_code_recipes_and_bundled_flows_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flowaug").rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("flowaug/")} == {s for s in sources if "__pycache__" not in s}
    assert {name.partition("/")[0] for name in names} == {"flowaug", f"flowaug-{flowaug.__version__}.dist-info"}


def test_the_installed_program_knows_its_version_and_is_not_the_checkout(installed):
    assert run(installed, program(installed), "--version") == f"flowaug {flowaug.__version__}\n"
    where = run(installed, sys.executable, "-c", "import flowaug; print(flowaug.__file__)")
    assert where.startswith(str(installed))


def test_both_trainings_run_on_the_embedded_data(installed):
    run(installed, program(installed), "train-flow", "--steps", "8", "--cpu", "--output", "runs/flow")
    out = run(installed, program(installed), "finetune", "--flow-aug", "--steps", "8", "--cpu")
    assert "validation accuracy" in out
    assert (installed / "runs" / "finetune" / "model.safetensors").is_file()


def test_the_command_that_a_training_prints_runs_as_it_stands(installed):
    options = ["--recipe", "default", "--quick", "--cpu", "--images-per-class", "9", "--output", "runs/printed flow"]
    out = run(installed, sys.executable, "-m", "flowaug", "train-flow", *options)
    command = out.strip().splitlines()[-1].partition("; next: ")[2]
    assert "--images-per-class 9" in command
    path = f"{installed / 'site' / 'bin'}:{os.environ['PATH']}"
    run(installed, "env", f"PATH={path}", "sh", "-c", f"{command} --steps 2 --cpu --output runs/next")
    assert (installed / "runs" / "next" / "metrics.json").is_file()


def test_the_quick_mode_of_every_recipe_runs(installed):
    out = run(installed, sys.executable, "-c", QUICK_RECIPES, *RECIPES)
    assert out.count("validation accuracy") == len(RECIPES)
