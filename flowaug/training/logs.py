"""What a training writes and prints: metrics over steps, and messages before and after it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaug.evaluation.plots import curves
from flowaug.files import write_atomic, write_json


class MetricsLog:
    """Metrics over steps, written to ``metrics.jsonl`` row by row and to ``metrics.json`` at the end.

    Args:
        folder: where the files go.
        active: False on all processes but the main one, which then write nothing.
        track: also receives (values, step) of every row, for an experiment tracker.
    """

    def __init__(self, folder: Path, active: bool = True, track: Callable[[dict, int], None] | None = None):
        self.folder, self.active, self.track = folder, active, track
        self.rows: list[dict] = []
        self.notes: dict = {}
        if active:
            folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, values: dict[str, float], bar=None) -> None:
        """Add the values of a step; show them on a tqdm bar if there is one."""
        self.rows.append({"step": step, **values})
        if self.track is not None:
            self.track(values, step)
        if bar is not None:
            bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        if self.active:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomic(self.folder / "metrics.jsonl", lines.encode())

    def note(self, name: str, value: Any) -> None:
        """Keep a value that belongs to the whole run."""
        self.notes[name] = value

    @property
    def last(self) -> dict[str, float]:
        """The latest row."""
        return self.rows[-1] if self.rows else {}

    def finish(self, **values) -> dict:
        """Write ``metrics.json``, the latest row with the notes and further values, and return it."""
        summary = {**self.last, **self.notes, **values}
        if self.active:
            write_json(self.folder / "metrics.json", summary)
        return summary

    def plot(self, names: list[str], title: str) -> None:
        """Draw the named values over the steps into ``curves.png``."""
        series = {n: ([r["step"] for r in self.rows if n in r], [r[n] for r in self.rows if n in r]) for n in names}
        if self.active and any(xs for xs, _ in series.values()):
            curves({n: s for n, s in series.items() if s[0]}, self.folder / "curves.png", title=title)

    def state_dict(self) -> dict:
        """Return rows and notes so far, for a resumed run."""
        return {"rows": self.rows, "notes": self.notes}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned."""
        self.rows, self.notes = state["rows"], state["notes"]


class RunningMean:
    """Mean of a loss since it was last read; the host does not wait for the device before that."""

    def __init__(self, device: torch.device):
        self.total, self.count = torch.zeros((), device=device), 0

    def update(self, loss: Tensor) -> None:
        """Add one loss."""
        self.total, self.count = self.total + loss, self.count + 1

    def read(self) -> float:
        """Return the mean of the losses since the last call, of which there is at least one, and reset it."""
        mean = self.total.item() / self.count
        self.total, self.count = torch.zeros_like(self.total), 0
        return mean

    def state_dict(self) -> dict:
        """Return sum and count."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned."""
        self.total, self.count = state["total"].to(self.total.device), state["count"]


def chance_warning(nf_acc: float, targets: Tensor, num_classes: int) -> str:
    """Return a warning for a flow whose latents tell the classes apart no better than guessing, or "".

    Chance is the larger of 1 / K and the share of the most frequent class, plus two standard errors.

    Args:
        nf_acc: fraction of the validation images whose latents are classified correctly.
        targets: labels (N,) of the validation images.
        num_classes: number of classes K.
    """
    count = len(targets)
    chance = max(1 / num_classes, torch.bincount(targets, minlength=num_classes).max().item() / count)
    if nf_acc > chance + 2 * math.sqrt(chance * (1 - chance) / count):
        return ""
    return (
        f"NF-Acc is {nf_acc:.3f} on {count} validation images, which is not above chance ({chance:.3f}): the flow has "
        "not learned the classes, and mixing with it may change labels; train longer (--steps, --max-epochs), add "
        "images, or use another flow"
    )


def order_warning(aa: str | None, copies: int | None, streamed: bool) -> str:
    """Return a warning for flow mixup after auto-augment, or "".

    Args:
        aa: auto-augment policy of the classifier.
        copies: offline copies, which are augmented before it.
        streamed: whether the data are a stream, which cannot be copied.
    """
    if not aa or copies:
        return ""
    text = "warning: flow mixup runs after --aa; train the flow with the same --aa"
    return text + ("" if streamed else ", or use --flow-aug-copies N to run it before")


def describe_mixing(counts: dict[str, int], can_copy: bool) -> str:
    """Return one sentence about `FlowMixupTransform.counts`, with advice where many images were rejected.

    Args:
        counts: what the transform counted.
        can_copy: whether ``--flow-aug-copies`` is an alternative.
    """
    seen, drawn = counts["seen"], sum(counts.values()) - counts["seen"]
    text = f"flow mixup augmented {counts['augmented'] / max(seen, 1):.0%} of the images"
    if 4 * counts["rejected"] <= drawn:
        return text
    sooner = "use --flow-aug-copies N to augment before --aa, or " if can_copy else ""
    return (
        f"{text}; {counts['rejected'] / drawn:.0%} of the selected images were rejected (decoded out of range or to "
        f"another class) and left unchanged; {sooner}train the flow longer"
    )


def describe_results(output: Path, summary: dict, can_copy: bool) -> str:
    """Return the closing message of a fine-tuning: accuracy, what flow mixup did, and where the outputs are."""
    top1, top5, images = (summary[name] for name in ("top1", "top5", "images"))
    mixing = [describe_mixing(summary["flow_aug"], can_copy)] if "flow_aug" in summary else []
    pictures = "curves.png" + (", augmented.png (before/after)" if mixing else "")
    lines = [
        f"validation accuracy {top1:.4f} (top-5 {top5:.4f}) on {images} images",
        *mixing,
        f"outputs in {output}: metrics.json, {pictures}",
        f"load the model with timm.create_model('local-dir:{output}', pretrained=True)",
    ]
    return "\n".join(lines)
