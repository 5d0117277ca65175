"""Commands set up threads before torch is imported; the library leaves the environment alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowaug.cli import threads

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
# sitecustomize is imported when Python starts; it notes the variables at the moment torch is first looked for
WATCH = """
import json, os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("WATCH " + json.dumps(dict(os.environ)), file=sys.stderr, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""


@pytest.fixture
def at_import_of_torch(tmp_path):
    """Function that runs Python up to the import of torch, and returns the variables of OpenMP at that moment."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)

    def run(*arguments, **variables):
        env = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)
        _, found, values = done.stderr.partition("WATCH ")
        assert found, done.stderr
        return {k: v for k, v in json.loads(values).items() if k in VARIABLES}

    return run


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "flowaug", "finetune"),
        ("-m", "flowaug", "list"),
        ("-c", "import sys; sys.argv = ['flowaug', 'train-flow']; from flowaug.cli.main import main; main()"),
        (str(ROOT / "finetune.py"), "--help"),
        (str(ROOT / "train_flow.py"), "--help"),
    ],
)
def test_commands_set_the_spin_count_before_torch_is_imported(at_import_of_torch, command):
    assert at_import_of_torch(*command)["GOMP_SPINCOUNT"] == str(threads.SPIN_COUNT)


@pytest.mark.parametrize(("script", "names"), [("finetune", "Training, main"), ("train_flow", "FlowTraining, main")])
def test_a_script_can_be_imported_for_its_training(script, names):
    code = f"from {script} import {names}; from flowaug.training import {script} as ours; assert main is ours.main"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "own",
    [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "3"}],
)
def test_variables_of_the_user_are_kept(at_import_of_torch, own):
    found = at_import_of_torch("-m", "flowaug", "list", **own)
    assert {**found, **own} == found
    assert ("GOMP_SPINCOUNT" in found) == ("GOMP_SPINCOUNT" in own)


def test_accelerates_number_of_threads_is_kept_and_waits_briefly_too(at_import_of_torch):
    found = at_import_of_torch("-m", "flowaug", "list", OMP_NUM_THREADS="3")
    assert found == {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": str(threads.SPIN_COUNT)}


def test_importing_the_library_leaves_the_environment_alone(at_import_of_torch):
    assert at_import_of_torch("-c", "import flowaug; flowaug.Flow") == {}
    code = "import os; before = dict(os.environ); import flowaug.cli.main; flowaug.Flow; assert os.environ == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_set_once_torch_is_imported(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    threads.set_up_threads()
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("5:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "400000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 4),
        ("5:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/../x\n", {}, None),
        (None, {}, None),  # no Linux
    ],
)
def test_the_quota_is_the_smallest_of_the_control_groups(tmp_path, monkeypatch, groups, files, quota):
    monkeypatch.setattr(threads, "GROUPS", tmp_path)
    monkeypatch.setattr(threads, "OWN_GROUP", tmp_path / "own")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "expected"), [(None, None), (0.2, "1"), (2.4, "2"), (64, None)])
def test_a_quota_below_the_number_of_cpus_limits_the_threads(monkeypatch, quota, expected):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "available_cpus", lambda: 8)
    threads.set_up_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected
