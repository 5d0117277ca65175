"""README and docstrings say what is so: their code runs, their files exist, the lint is clean."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowaug

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ENGINE = (ROOT / "docs" / "engine.md").read_text()
MODULES = [m.name for m in pkgutil.walk_packages(flowaug.__path__, "flowaug.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_docstring_examples():
    count = sum(len(doctest.DocTestFinder().find(importlib.import_module(n))) for n in MODULES)
    assert count > 20


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README + ENGINE, re.S))
def test_readme_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_readme_links_exist(link):
    assert (ROOT / link).exists()


def test_every_public_name_is_there():
    for name in flowaug.__all__:
        assert getattr(flowaug, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_lint(arguments):
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.glob("flowaug/**/*.py") if (n := p.read_text().count("\n")) > 300}
    assert not long
