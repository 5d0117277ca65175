"""Several runs that share a folder, and processes that lose each other."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from torch import distributed

from flowaug.files import write_atomic
from flowaug.flows.checkpoint import load_flow
from flowaug.training import flow_source, resume, runtime
from tests.conftest import finetune_options
from tests.training.test_scripts import ROOT

SMALL = ["--images-per-class", "9", "--cpu", "--workers", "0"]
CLASSIFIER = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--steps", "2", "--batch-size", "8"]


def test_runs_that_need_the_same_flow_train_it_once(tmp_path):
    command = [sys.executable, "-m", "flowaug", "finetune", "--flow-aug", "--quick", *SMALL, *CLASSIFIER]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [*command, "--seed", str(i), "--output", str(tmp_path / str(i))],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert len(list((tmp_path / "flows").glob("*/model.safetensors"))) == 1
    reused = ("using the flow trained for this data set earlier", "finished by another run meanwhile")
    assert sum(any(text in out for text in reused) for out, _ in results) == 1


def folder_of(options, names=("a", "b")):
    data = SimpleNamespace(fingerprint=lambda: "0" * 16, name="pets", class_names=names)
    return flow_source.own_flow_options(options, data).run.output, data


def test_a_run_waits_while_another_trains_the_flow(tmp_path, monkeypatch):
    options = finetune_options("--data-dir", str(tmp_path), "--flow-aug", "--output", str(tmp_path / "out"))
    folder, data = folder_of(options)
    said, waited = [], []
    accelerator = SimpleNamespace(print=said.append, is_main_process=True)

    def in_use(*_):
        raise resume.FolderInUseError("in use")

    def finished(where, main):
        waited.append(where)
        if len(waited) == 2:  # the first other run was killed, the second one finishes
            where.mkdir(parents=True)
            resume.mark_finished(where, {})

    monkeypatch.setattr(flow_source, "train_flow", in_use)
    monkeypatch.setattr(flow_source, "wait_until_free", finished)
    assert flow_source.find_flow(options, data, accelerator) == folder
    assert waited == [folder, folder]
    assert sum("another run is training this flow; waiting for it" in text for text in said) == 2
    assert "using the flow trained" in said[-1]


def test_waiting_ends_when_the_other_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_TIMEOUT_S", 0.05)
    held = threading.Event()

    def hold():
        with resume.exclusive_folder(tmp_path):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    began = time.monotonic()
    with pytest.raises(resume.FolderInUseError), resume.exclusive_folder(tmp_path):
        pass
    resume.wait_until_free(tmp_path)
    assert 0.3 < time.monotonic() - began < 5
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"cannot write to the folder .*out \(.*\); choose another --output"),
        resume.exclusive_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_a_folder_with_the_name_of_a_file_is_named(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(OSError, match=r"could not write .*state \(Is a directory\)"):
        write_atomic(tmp_path / "state", b"x")


@pytest.mark.parametrize(
    "error", [distributed.DistBackendError("NCCL error\nat x"), RuntimeError("[gloo/pair.cc:534] Connection closed")]
)
def test_a_lost_process_is_one_sentence(error):
    with pytest.raises(SystemExit, match="prog: another process of this run"), runtime.one_sentence_errors("prog"):
        raise error


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), runtime.one_sentence_errors("prog"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("source", "message"), [(None, "the flow is None"), ("hf-hub:a/b/c", "not the name of a reposi")]
)
def test_a_flow_that_cannot_be_one_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_flow(source)
