"""Documentation: its code runs, its links and commands are valid, docstring examples hold, the lint is clean."""

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import flowaug
from flowaug.cli.main import create_parser
from flowaug.training.options import FinetuneOptions, TrainFlowOptions, command_line

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ENGINE = (ROOT / "docs" / "engine.md").read_text()
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
}
LINKS = [(name, link) for name, text in DOCUMENTS.items() for link in re.findall(r"\]\(([^)#:\s]+)\)", text)]
TRAININGS = {"train-flow": TrainFlowOptions, "finetune": FinetuneOptions}
MODULES = [m.name for m in pkgutil.walk_packages(flowaug.__path__, "flowaug.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", flowaug.__all__)
def test_each_public_name_has_a_docstring_example(name):
    assert doctest.DocTestParser().get_examples(getattr(flowaug, name).__doc__)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README + ENGINE, re.S))
def test_readme_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(("document", "link"), LINKS)
def test_links_exist(document, link):
    assert ((ROOT / document).parent / link).exists()


def documented_commands():
    """Arguments of ``flowaug`` in the shell blocks of all documents and in the inline code of the README."""
    blocks = [block for text in DOCUMENTS.values() for block in re.findall(r"```sh\n(.*?)```", text, re.S)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    found = (re.fullmatch(r"(?:accelerate launch -m )?flowaug ([a-z][a-z-]*.*)", line.strip()) for line in lines)
    return sorted({match[1] for match in found if match})


@pytest.mark.parametrize("arguments", documented_commands())
def test_documented_commands_are_valid(arguments):
    command, *rest = shlex.split(arguments)
    if command in TRAININGS:
        command_line.create_parser(TRAININGS[command], command, None).parse_args(rest)
    else:
        create_parser().parse_args([command, *rest])


def test_every_public_name_is_there():
    for name in flowaug.__all__:
        assert getattr(flowaug, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_lint(arguments):
    result = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
