"""Checkpoints with random damage: loaded with finite outputs, or refused with one clear error."""

from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import mutated_checkpoints

    return mutated_checkpoints


def test_mutated_checkpoints_are_refused_clearly_or_give_finite_outputs(benchmark):
    results = benchmark.run(100, seed=2)
    assert [result for result in results if result.outcome not in benchmark.OUTCOMES[:2]] == []
    outcomes = Counter(result.outcome for result in results)
    assert outcomes["refused, clear error"] > 50  # the mutations are no small ones


def test_the_report_counts_every_result_once(benchmark):
    results = [benchmark.Result(kind, "hang", "") for kind in benchmark.MUTATIONS]
    assert "| all | 0 | 0 | 0 | 5 | 0 | 0 |" in benchmark.report(results, seed=0, seconds=1.0)


def test_raw_tracebacks_and_non_finite_outputs_are_counted_as_such(benchmark, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(benchmark, "_use", lambda folder: {}[folder])
    assert benchmark.classify(tmp_path)[0] == "raw traceback"
    monkeypatch.setattr(benchmark, "_use", lambda folder: False)
    assert benchmark.classify(tmp_path)[0] == "non-finite output"
    monkeypatch.setattr(benchmark, "SECONDS", 1)
    monkeypatch.setattr(benchmark, "_use", lambda folder: __import__("time").sleep(5))
    assert benchmark.classify(tmp_path)[0] == "hang"
