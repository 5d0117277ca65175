"""What a training leaves for people and machines: metrics, pictures, the folder of a flow and its model card."""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowaug.checkpoint import pack, save_flow, write_atomic, write_json
from flowaug.fitting import ImageTable, fit_pca
from flowaug.flow import Flow
from flowaug.generation import sample
from flowaug.mixup import MixPlan
from flowaug.moments import ClassMoments
from flowaug.pca import ClasswisePCA
from flowaug.plots import augmentation_grid, curves, image_grid
from flowaug.transform import FlowMixupTransform

PREVIEW_WEIGHTS, PREVIEW_SEEDS = (0.25, 0.5, 0.75, 1.0), (1, 2)
PROGRESS_IMAGES, PROGRESS_RANK = 640, 8
MOMENTS = "moments.safetensors"


class MetricsLog:
    """Numbers over steps, kept in ``metrics.jsonl`` line by line and in ``metrics.json`` at the end.

    Args:
        folder: where the files go.
        active: False on all processes but the main one, which then write nothing.
        track: takes (values, step) of every row too, for an experiment tracker.
    """

    def __init__(self, folder: Path, active: bool = True, track: Callable[[dict, int], None] | None = None):
        self.folder, self.active, self.track = folder, active, track
        self.rows: list[dict] = []
        self.notes: dict = {}
        if active:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, values: dict[str, float], bar=None) -> None:
        """Add the numbers of a step; show them on a tqdm bar if there is one."""
        self.rows.append({"step": step, **values})
        if self.track is not None:
            self.track(values, step)
        if bar is not None:
            bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        if self.active:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def note(self, name: str, value) -> None:
        """Keep a number or a dictionary that belongs to the whole run."""
        self.notes[name] = value

    @property
    def last(self) -> dict[str, float]:
        """The newest row."""
        return self.rows[-1] if self.rows else {}

    def finish(self, **values) -> dict:
        """Write ``metrics.json``: the newest row, the notes and further values."""
        summary = {**self.last, **self.notes, **values}
        if self.active:
            write_json(self.folder / "metrics.json", summary)
        return summary

    def plot(self, names: list[str], title: str) -> None:
        """Draw the named numbers over the steps into ``curves.png``."""
        series = {n: ([r["step"] for r in self.rows if n in r], [r[n] for r in self.rows if n in r]) for n in names}
        if self.active and any(xs for xs, _ in series.values()):
            curves({n: s for n, s in series.items() if s[0]}, self.folder / "curves.png", title=title)

    def state_dict(self) -> dict:
        """Rows and notes so far, for a resumed run."""
        return {"rows": self.rows, "notes": self.notes}

    def load_state_dict(self, state: dict) -> None:
        """Take up the rows and notes of a killed run."""
        self.rows, self.notes = state["rows"], state["notes"]


class RunningMean:
    """Mean of a loss since it was last read; nothing comes back from the device before that."""

    def __init__(self, device: torch.device):
        self.total, self.count = torch.zeros((), device=device), 0

    def update(self, loss: torch.Tensor) -> None:
        """Count one more loss."""
        self.total, self.count = self.total + loss, self.count + 1

    def read(self) -> float:
        """The mean of the losses since the last reading, of which there is at least one; begins anew."""
        mean = self.total.item() / self.count
        self.total, self.count = torch.zeros_like(self.total), 0
        return mean

    def state_dict(self) -> dict:
        """Sum and count."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what ``state_dict`` returned."""
        self.total, self.count = state["total"].to(self.total.device), state["count"]


def write_flow_folder(
    folder: Path,
    flow: Flow,
    pca: ClasswisePCA,
    moments: ClassMoments,
    dataset,
    train: ImageTable,
    val: ImageTable,
    recipe: dict,
    log: MetricsLog,
) -> None:
    """Write checkpoint, moments, metrics, pictures and card of a trained flow.

    Args:
        folder: where to.
        flow: the averaged flow.
        pca: its class axes.
        moments: class moments of the training images' latents.
        dataset: the training data set (for names).
        train: training images.
        val: validation images, which the pictures show.
        recipe: options that made the flow.
        log: the numbers of the run.
    """
    save_flow(flow, folder, pca, class_names=list(dataset.class_names), recipe=recipe, data=dataset.fingerprint())
    write_atomic(folder / MOMENTS, pack(moments.tensors()))
    summary = log.finish(train_images=len(train), val_images=len(val))
    log.plot(["bits_per_dim", "nf_acc"], f"{dataset.name}: flow on the val split")
    draw_flow(flow, pca, val, folder)
    write_atomic(folder / "README.md", model_card(flow, pca, dataset.name, recipe, summary).encode())


def draw_flow(flow: Flow, pca: ClasswisePCA, val: ImageTable, folder: Path) -> None:
    """Draw ``samples.png`` and ``augmented.png``, the latter of images of the val split."""
    draw_samples(flow, folder / "samples.png")
    chosen = one_per_class(val.targets)
    transform = FlowMixupTransform(flow, pca)
    draw_augmented(transform, val.images[chosen].float() / 255, val.targets[chosen], folder / "augmented.png")


def draw_progress(flow: Flow, train: ImageTable, val: ImageTable, folder: Path) -> None:
    """Draw both pictures of a flow in training, with class axes of a few images per class."""
    each = max(PROGRESS_IMAGES // train.num_classes, PROGRESS_RANK)
    rows = [torch.nonzero(train.targets == label)[:each, 0] for label in range(train.num_classes)]
    few = replace(train.subset(torch.cat(rows)), rank=0, world_size=1)
    draw_flow(flow, fit_pca(flow, few, flow.gaussians.mean.device, PROGRESS_RANK), val, folder)


def one_per_class(targets: Tensor, limit: int = 10) -> Tensor:
    """Positions of the first image of each of the first ``limit`` classes present."""
    return torch.stack([(targets == label).nonzero()[0, 0] for label in targets.unique()[:limit]])


def draw_samples(
    flow: Flow,
    path: Path,
    temperature: float = 0.7,
    columns: int = 8,
    classes: int = 10,
    seed: int = 0,
    gaussians: ClasswisePCA | None = None,
) -> Path:
    """Draw class-conditional samples as PNG, a row per class.

    Args:
        flow: a trained flow of images.
        path: the PNG.
        temperature: scales the covariance.
        columns: samples of each class.
        classes: classes to show, the first ones.
        seed: seed of the draws.
        gaussians: full class covariances to draw from (``flowaug.generation.rfcm``); None for the flow's own.
    """
    rows = min(flow.gaussians.num_classes, classes)
    images = sample(flow, torch.arange(rows).repeat_interleave(columns), temperature, seed, gaussians)
    title = f"samples at temperature {temperature:g}" + (", full class covariances" if gaussians else "")
    return image_grid(images.unflatten(0, (rows, columns)), path, class_labels(flow, range(rows)), title=title)


def class_labels(flow: Flow, labels: Iterable[int]) -> list[str]:
    """What pictures call the classes: their names, or numbers where the flow knows none."""
    return [flow.class_names[k] if flow.class_names else str(k) for k in labels]


def draw_augmented(transform: FlowMixupTransform, x: Tensor, y: Tensor, path: Path) -> Path:
    """Draw original and mixed images for several weights as PNG, one row per image.

    With a weight for each axis, some mixed as the transform draws them follow.

    Args:
        transform: the augmentation; its flow and axes are used, not its generator.
        x: images (B, C, H, W), of the range and normalisation that ``transform`` expects.
        y: labels (B,).
        path: the PNG.
    """
    device = transform.pca.axes.device
    x, y = x.to(device), y.to(device)
    plans = {w: fixed_plan(transform, y, w) for w in PREVIEW_WEIGHTS}
    title = "flow mixup with a training image of the same class; w = share of the partner"
    if transform.sampler.per_axis:
        plans |= {f"drawn {seed}": drawn_plan(transform, y, seed) for seed in PREVIEW_SEEDS}
        title += "; drawn: a weight for each axis, as in training"
    augmented = {name: transform.pixels(transform.apply(x, y, plan)) for name, plan in plans.items()}
    labels = class_labels(transform.flow, y.tolist())
    return augmentation_grid(transform.pixels(x), None, augmented, labels, path, title=title)


def fixed_plan(transform: FlowMixupTransform, y: Tensor, weight: float, seed: int = 0) -> MixPlan:
    """A plan that moves every image by one weight along all axes, partners drawn from the table by ``seed``."""
    pca = transform.pca
    u = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    partner = pca.offsets[y] + (u * pca.count[y]).long()
    index = torch.arange(len(y), device=y.device)
    return MixPlan(index, torch.full((len(y), transform.sampler.policy.max_rank), weight, device=y.device), partner)


def drawn_plan(transform: FlowMixupTransform, y: Tensor, seed: int) -> MixPlan:
    """A plan as the transform draws them, but of every image, and by another generator."""
    sampler = copy.copy(transform.sampler)
    sampler.policy = sampler.policy.always()
    sampler.reseed(seed)
    return sampler(y)


def model_card(flow: Flow, pca: ClasswisePCA, dataset: str, recipe: dict, summary: dict) -> str:
    """Model card of a flow as markdown: what it is, its numbers, its recipe and how to use it."""
    parameters = sum(p.numel() for p in flow.parameters())
    rows = "\n".join(f"| {k} | {_show(v)} |" for k, v in summary.items())
    return f"""# Flow for {dataset}

A conditional normalizing flow `{flow.config["architecture"]}` ({parameters / 1e6:.2f} M parameters) for images of shape
{tuple(flow.event_shape)}, {flow.config["num_classes"]} classes, with {pca.rank} principal axes per class, made by
`train_flow.py` of [flowaug](https://pypi.org/project/flowaug/).

```python
from flowaug import FlowMixupTransform

flow_mixup = FlowMixupTransform.from_pretrained("path/to/this/folder")
x, y = flow_mixup(x, y)  # x in [0, 1] or uint8, y integer labels
```

## Measured on the val split

| | |
|---|---|
{rows}

`samples.png` shows draws from the class Gaussians, `augmented.png` images of the val split mixed with training images.

## Recipe

```json
{json.dumps(recipe, indent=2)}
```
"""


def _show(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
