"""The layout of docs/design.md: small folders, short files, imports downwards only, types that hold."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowaug

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowaug"
OLD_PATHS = {
    "flowaug.bijections": "ActNorm",
    "flowaug.checkpoint": "find_flow",
    "flowaug.data": "load_dataset",
    "flowaug.estimators": "fpi",
    "flowaug.loaders": "mix_seed",
    "flowaug.metrics": "fid",
    "flowaug.oracle": "load_teacher",
    "flowaug.timm": "wrap_loader",
}


def modules(folder):
    return [path for path in folder.glob("*.py") if path.name != "__init__.py"]


def test_folders_stay_small():
    assert len(modules(PACKAGE)) <= 5
    full = {str(folder): len(modules(folder)) for folder in PACKAGE.rglob("*") if folder.is_dir()}
    assert max(full.values()) <= 15, full


def test_files_stay_short():
    lengths = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_scripts_only_call_the_package():
    for name in ("train_flow.py", "finetune.py"):
        assert (ROOT / name).read_text().count("\n") <= 10


def test_packages_import_downwards_only_and_without_circles():
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_types_hold():
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent))
    command = [program, "--pythonpath", sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("path", OLD_PATHS)
def test_import_paths_of_version_0_1_still_work(path):
    code = f"import {path} as module, sys; from {path} import {OLD_PATHS[path]}; print(module.__spec__.name)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in (path, flowaug._renamed.RENAMED.get(path))
