"""Image grids, curves, intervals and scatter plots as PNG files, without pyplot and its global state."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torchvision.utils import make_grid

from flowaug.files import printable, write_atomic

DPI = 100
CELL = 48  # minimum side of an image in a grid, in pixels
WIDEST_CELL = 160  # maximum width up to which images are enlarged to fit their column labels, in pixels
GAP, WIDE_GAP, MARGIN = 4, 16, 12  # in pixels
FONT, TITLE_FONT, INK = 9, 11, "#222222"
TITLE_PIXELS = 9  # maximum width of a bold character of a title
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito (2008)
CLASS_COLOURS = (*COLOURS, "#000000", "#8C564B", "#888888", "#6A3D9A")
MARKERS = "os^Dv<>p"  # with the colours, 80 styles
LEGEND_ROWS, LEGEND_MOST = 24, 80
MOST_PANELS = 5  # per row
HALO = [withStroke(linewidth=3, foreground="white")]

Images = np.ndarray | torch.Tensor


def image_grid(images: Images, path, row_labels=None, column_labels=None, title=None, scale=None, gap_after=()) -> Path:
    """Write a grid of R × C images as PNG, each pixel as a square of ``scale`` × ``scale`` pixels.

    Args:
        images: ``(R, C, 1 or 3, H, W)``, uint8 or float in [0, 1]; values outside are clipped.
        path: output file, written atomically.
        row_labels: R labels; long ones are wrapped.
        column_labels: C labels; long ones are wrapped.
        title: title above the grid.
        scale: magnification; None enlarges small images until they and their labels are readable.
        gap_after: indices of columns that are followed by a wider gap.

    Raises:
        ValueError: if the shape is wrong, a value is NaN, or the number of labels does not match.
    """
    if images.ndim != 5 or images.shape[2] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (rows, columns, 1 or 3, H, W)")
    row_labels = _check_labels(row_labels, images.shape[0], "row")
    column_labels = _check_labels(column_labels, images.shape[1], "column")

    scale = scale or _readable_scale(images.shape[3], images.shape[4], column_labels)
    pixels = _to_uint8(images).repeat(scale, axis=3).repeat(scale, axis=4)
    canvas, lefts = _compose(pixels, set(gap_after))
    return _draw_grid(canvas, lefts, pixels.shape[3:], row_labels, column_labels, title, Path(path))


def augmentation_grid(
    originals: Images, partners: Images | None, augmented: Mapping[float | str, Images], labels, path, title=None
) -> Path:
    """Write one row per image: the original, its mixtures by increasing weight, mixtures with a name, and the partner.

    Args:
        originals: ``(N, C, H, W)``.
        partners: ``(N, C, H, W)`` or None.
        augmented: mixed images ``(N, C, H, W)`` by weight or name.
        labels: N class names.
        path: output file.
        title: title above the grid.

    Raises:
        ValueError: as for :func:`image_grid`, or if the shapes differ.
    """
    keys = sorted(augmented, key=lambda key: (isinstance(key, str), key))
    mixtures = {key if isinstance(key, str) else f"w = {key:g}": augmented[key] for key in keys}
    stacks = {"original": originals, **mixtures}
    if partners is not None:
        stacks["partner"] = partners
    shapes = {name: tuple(stack.shape) for name, stack in stacks.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the images' shapes differ: {shapes}; expected the same (N, C, H, W) for all")
    images = np.stack([_to_uint8(stack) for stack in stacks.values()], axis=1)
    return image_grid(images, path, labels, list(stacks), title, gap_after={0, len(augmented)})


def curves(series: Mapping[str, tuple], path, xlabel="step", ylabel=None, title=None) -> Path:
    """Write curves as PNG: one panel per series, or a single panel if ``ylabel`` is given.

    Args:
        series: ``(xs, ys)`` of equal lengths by name.
        path: output file.
        xlabel: label of the x axis.
        ylabel: common label of the y axis; None for series with different units.
        title: title above the panels.

    Raises:
        ValueError: if there is no series, or xs and ys differ in length.
    """
    uneven = [name for name, (xs, ys) in series.items() if len(xs) != len(ys)]
    if uneven or not series:
        raise ValueError(f"series {uneven or 'is empty'}: expected name: (xs, ys) with as many xs as ys")

    count = 1 if ylabel else len(series)
    figure = Figure(figsize=(max(4.2 * count, 5.5), 3.2), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for i, (name, (xs, ys)) in enumerate(series.items()):
        panel = panels[0 if ylabel else i]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "o" if len(xs) < 20 else None, "ms": 3.5}
        panel.plot(xs, ys, label=printable(name), **style)
        panel.set_title(None if ylabel else printable(name), fontsize=FONT + 1, color=INK, parse_math=False)
    for panel in panels:
        _style_axes(panel, xlabel, ylabel)
        if all(float(x).is_integer() for line in panel.lines for x in line.get_xdata()):
            panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if ylabel and len(series) > 1:
        _legend(panels[0])
    _add_title(figure, title)
    return _save(figure, Path(path))


def intervals(panels: Mapping[str, Mapping[str, tuple[float, float]]], path, xlabel="", title=None) -> Path:
    """Write means with error bars as PNG: one panel per group, one row per name, and a line at 0.

    Args:
        panels: (mean, half width of the interval) by group and name; half widths that are not finite are not drawn.
        path: output file.
        xlabel: label of the x axis.
        title: title above the panels.

    Raises:
        ValueError: if there is no group or a group is empty.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"panels {list(panels)}: expected at least one non-empty group of name: (mean, half width)")

    lines = math.ceil(len(panels) / MOST_PANELS)
    columns = math.ceil(len(panels) / lines)
    size = (0.6 + 3.6 * columns, lines * (1.2 + 0.3 * max(map(len, panels.values()))))
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for panel in axes[len(panels) :]:
        panel.remove()

    for panel, (group, rows) in zip(axes, panels.items(), strict=False):
        _draw_intervals(panel, rows)
        _style_axes(panel, xlabel, None)
        panel.set_title(printable(group), fontsize=FONT + 1, color=INK, parse_math=False)
    _add_title(figure, title)
    return _save(figure, Path(path))


def _add_title(figure: Figure, title: str | None) -> None:
    if title:
        wrapped = textwrap.fill(printable(title), int(figure.get_figwidth() * DPI) // TITLE_PIXELS)
        figure.suptitle(wrapped, fontsize=TITLE_FONT, fontweight="bold", color=INK, parse_math=False)


def _draw_intervals(panel, rows: Mapping[str, tuple[float, float]]) -> None:
    panel.axvline(0, color=INK, lw=0.8)
    for row, (mean, half) in enumerate(rows.values()):
        half = half if np.isfinite(half) else 0.0
        panel.errorbar(mean, row, xerr=half, color=COLOURS[0], marker="o", ms=4, capsize=3, lw=1.5)
    panel.set_yticks(range(len(rows)), list(rows), parse_math=False)
    panel.set_ylim(len(rows) - 0.5, -0.5)  # first row at the top


def scatter(points: np.ndarray, labels: Sequence[int], names: Sequence[str], path, title=None, axes=("", "")) -> Path:
    """Write a scatter plot as PNG, with a colour and marker per class; up to ten classes are also named in the plot.

    Args:
        points: (N, 2).
        labels: class of each point, in ``0 .. len(names) - 1``.
        names: names of the classes for the legend; with more than 80 classes there is none, and styles repeat.
        path: output file.
        title: title above the plot.
        axes: labels of the x and y axes.

    Raises:
        ValueError: if the shape of the points is wrong, or there is not one label per point.
    """
    points, classes = np.asarray(points), np.asarray(labels)
    if points.ndim != 2 or points.shape[1] != 2 or classes.shape != points.shape[:1]:
        raise ValueError(f"points have shape {points.shape}, labels {classes.shape}; expected (N, 2) and (N,)")

    shown = np.unique(classes)
    columns = -(-len(shown) // LEGEND_ROWS) if len(shown) <= LEGEND_MOST else 0
    figure = Figure(figsize=(6.4 + 1.1 * columns, 5.6), dpi=DPI, facecolor="white", layout="constrained")
    panel = figure.subplots()
    for k in shown:
        _draw_class(panel, points[classes == k], k, str(names[k]), named=len(shown) <= len(CLASS_COLOURS))
    _style_axes(panel, *axes)
    if columns:
        _legend(panel, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns, handletextpad=0.3)
    if title:
        style = {"fontsize": TITLE_FONT, "fontweight": "bold", "color": INK}
        panel.set_title(textwrap.fill(printable(title), 70), loc="left", pad=10, parse_math=False, **style)
    return _save(figure, Path(path))


def _draw_class(panel, points: np.ndarray, k: int, name: str, named: bool) -> None:
    colour, marker = CLASS_COLOURS[k % len(CLASS_COLOURS)], MARKERS[k // len(CLASS_COLOURS) % len(MARKERS)]
    label = textwrap.fill(printable(name), 18)
    panel.scatter(*points.T, s=20, alpha=0.75, lw=0, c=colour, marker=marker, label=label)
    if named:
        style = {"fontsize": FONT + 1, "fontweight": "bold", "ha": "center", "va": "center"}
        panel.text(*np.median(points, 0), label, color=colour, path_effects=HALO, parse_math=False, **style)


def _legend(panel, **style) -> None:
    for text in panel.legend(frameon=False, fontsize=FONT, **style).get_texts():
        text.set_parse_math(False)


def _to_uint8(images: Images) -> np.ndarray:
    if isinstance(images, torch.Tensor):
        images = (images.float() if images.is_floating_point() else images).detach().cpu().numpy()
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ValueError(f"images are {images.dtype}; expected uint8, or float in [0, 1]")
    if np.isnan(images).any():
        raise ValueError("the images contain NaN; expected values in [0, 1]")
    return np.rint(images.clip(0, 1) * 255).astype(np.uint8)


def _check_labels(labels: Sequence[str] | None, count: int, kind: str) -> list[str]:
    if labels is None:
        return []
    if len(labels) != count:
        raise ValueError(f"got {len(labels)} {kind} labels for {count} {kind}s of images; expected one per {kind}")
    return [textwrap.fill(printable(label), 18) for label in labels]


def _readable_scale(height: int, width: int, labels: list[str]) -> int:
    """Return the smallest factor that makes an image at least ``CELL`` pixels a side and as wide as its label."""
    widest = max((_text_size(label)[0] + GAP for label in labels), default=0)
    return max(-(-CELL // min(height, width)), -(-min(widest, WIDEST_CELL) // width))


def _text_size(text: str, size: float = FONT, weight: str = "normal") -> tuple[int, int]:
    """Measure the width and height of a text in pixels."""
    figure = Figure(dpi=DPI)
    drawn = figure.text(0, 0, text, fontsize=size, fontweight=weight, parse_math=False)
    box = drawn.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    return int(np.ceil(box.width)), int(np.ceil(box.height))


def _compose(images: np.ndarray, wide: set[int]) -> tuple[np.ndarray, list[int]]:
    """Arrange images ``(R, C, 1 or 3, H, W)`` on a white canvas; also return the left edge of each column."""
    rows, columns, _, _, width = images.shape
    grid = make_grid(torch.from_numpy(images).flatten(0, 1), nrow=columns, padding=GAP, pad_value=255)
    grid = grid if rows * columns == 1 else grid[:, GAP:-GAP, GAP:-GAP]  # a single image has no border

    # make_grid has gaps of one width only, so the wider gaps after some columns are inserted here.
    ends = [c * (width + GAP) + width for c in sorted(wide) if c < columns - 1]
    canvas = np.insert(grid.permute(1, 2, 0).numpy(), np.repeat(ends, WIDE_GAP - GAP).astype(int), 255, axis=1)
    lefts = [c * (width + GAP) + sum(w < c for w in wide) * (WIDE_GAP - GAP) for c in range(columns)]
    return canvas, lefts


def _draw_grid(canvas, lefts, cell, row_labels, column_labels, title, path: Path) -> Path:
    """Place the canvas and its labels at whole pixels, so that nothing is resampled."""
    left = MARGIN + max((_text_size(label)[0] + 8 for label in row_labels), default=0)
    width = left + max(canvas.shape[1], 2 * WIDEST_CELL * bool(title)) + MARGIN
    title = textwrap.fill(printable(title or ""), (width - left) // TITLE_PIXELS)
    top = MARGIN + canvas.shape[0]  # matplotlib measures y from the bottom
    above = max((_text_size(label)[1] + 6 for label in column_labels), default=0)
    height = top + above + (_text_size(title, TITLE_FONT, "bold")[1] + 12 if title else 0) + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    figure.figimage(canvas, left, MARGIN, origin="upper")

    def write(x, y, text, size=FONT, **style):
        figure.text(x / width, y / height, text, fontsize=size, color=INK, parse_math=False, **style)

    for r, label in enumerate(row_labels):
        write(left - 8, top - r * (cell[0] + GAP) - cell[0] / 2, label, ha="right", va="center")
    for c, label in enumerate(column_labels):
        write(left + lefts[c] + cell[1] / 2, top + 6, label, ha="center", va="bottom")
    write(left, height - MARGIN, title, TITLE_FONT, va="top", fontweight="bold")
    return _save(figure, path)


def _style_axes(panel, xlabel: str, ylabel: str | None) -> None:
    panel.set_xlabel(xlabel, fontsize=FONT, color=INK)
    panel.set_ylabel(ylabel or "", fontsize=FONT, color=INK)
    panel.tick_params(labelsize=FONT - 1, colors=INK, length=3)
    panel.grid(color="#e6e6e6", lw=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(path, buffer.getvalue())
    return path
