"""What a training prints and writes: metrics over steps and messages."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from flowaug.data.wds.index import is_shards
from flowaug.evaluation.plots import curves
from flowaug.files import write_atomic, write_json


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


def could_move_first(args: argparse.Namespace) -> bool:
    """Whether ``--flow-aug-copies`` is left out but possible: shards are a stream and cannot be copied."""
    return args.flow_aug_copies is None and not is_shards(args.dataset, args.data_dir)


def describe_order(args: argparse.Namespace) -> str:
    """What to know before a training whose flow gets images that ``--aa`` has changed; "" if there is nothing."""
    if not args.aa or args.flow_aug_copies:
        return ""
    text = "the flow gets images that --aa has changed: train it with the same --aa"
    return text + (", or let it move them first, in --flow-aug-copies N" if could_move_first(args) else "")


def describe_weights(args: argparse.Namespace) -> str:
    """Which share of the images flow mixup is asked to change, and by how many weights each."""
    weights = "a weight for each class axis" if args.flow_aug_per_axis else "one weight for all class axes"
    return f"p = {args.flow_aug_p:g}, {weights}"


def describe_mixing(counts: dict[str, int], can_move_first: bool) -> str:
    """One sentence on what `FlowMixupTransform.counts` come to, and a way out where the guard refused much."""
    seen, drawn = counts["seen"], sum(counts.values()) - counts["seen"]
    text = f"flow mixup changed {counts['augmented'] / max(seen, 1):.0%} of the images"
    if 4 * counts["refused"] <= drawn:
        return text
    sooner = "move them before --aa changes them (--flow-aug-copies N) or " if can_move_first else ""
    return (
        f"{text}; {counts['refused'] / drawn:.0%} of those drawn went back as they came, as no likely image of "
        f"their class came of them; {sooner}train the flow for longer"
    )


def describe_results(args: argparse.Namespace, summary: dict) -> str:
    """What a finished training says: accuracy, what the flow did, and where everything is."""
    top1, top5, images = (summary[name] for name in ("top1", "top5", "images"))
    mixing = [describe_mixing(summary["flow_aug"], could_move_first(args))] if "flow_aug" in summary else []
    pictures = "curves.png" + (", augmented.png (before/after)" if mixing else "")
    lines = [
        f"test accuracy {top1:.4f} (top-5 {top5:.4f}) on {images} images",
        *mixing,
        f"outputs in {args.output}: metrics.json, {pictures}",
        f"load it by timm.create_model('local-dir:{args.output}', pretrained=True)",
    ]
    return "\n".join(lines)
