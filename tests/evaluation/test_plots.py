import numpy as np
import pytest
import torch
from PIL import Image

from flowaug.evaluation.plots import (
    CLASS_COLOURS,
    LEGEND_MOST,
    _readable_scale,
    augmentation_grid,
    curves,
    image_grid,
    intervals,
    scatter,
)


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def squares(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape, dtype=np.uint8)  # darker than the white background


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_pixel_exactly(tmp_path, channels):
    images = squares(2, 3, channels, 8, 8)
    path = image_grid(images, tmp_path / "new" / "grid.png")
    picture = read(path)
    assert picture.shape == (12 + 2 * 48 + 4 + 12, 12 + 3 * 48 + 2 * 4 + 12, 3)
    for r, c in np.ndindex(2, 3):
        cell = picture[12 + r * 52 :, 12 + c * 52 :][:48, :48]
        expected = np.broadcast_to(np.moveaxis(images[r, c], 0, -1), (8, 8, 3)).repeat(6, 0).repeat(6, 1)
        np.testing.assert_array_equal(cell, expected)


def test_float_and_bfloat16_images_are_drawn_like_uint8_and_clipped(tmp_path):
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).reshape(1, 5, 1, 1, 1).expand(1, 5, 1, 4, 4)
    first = read(image_grid(images, tmp_path / "a.png"))
    middles = first[36, 36::52, 0]
    assert middles.tolist() == [0, 0, 128, 255, 255]
    np.testing.assert_array_equal(read(image_grid(images.bfloat16().requires_grad_(), tmp_path / "b.png")), first)


def test_labels_and_title_do_not_overlap_the_images(tmp_path):
    images = squares(2, 2, 1, 60, 60)
    labelled = read(image_grid(images, tmp_path / "labelled.png", [r"$\cat$", "dog"], ["a", "b"]))
    bare = read(image_grid(images, tmp_path / "bare.png"))
    titled = read(image_grid(images, tmp_path / "titled.png", [r"$\cat$", "dog"], ["a", "b"], r"pets & $\more$"))
    np.testing.assert_array_equal(labelled[-136:-12, -136:-12], bare[12:-12, 12:-12])
    left, above = (labelled.shape[axis] - bare.shape[axis] for axis in (1, 0))
    for ink in (
        labelled[-136:-76, 12 : 12 + left - 8],  # beside the first row
        labelled[-72:-12, 12 : 12 + left - 8],  # beside the second row
        labelled[12 : 12 + above - 6, -136:-76],  # above the first column
        titled[12 : titled.shape[0] - labelled.shape[0]],
    ):
        assert ink.min() < 100
    inked = np.flatnonzero(labelled[-136:-76, 12 : 12 + left - 8].min(axis=(1, 2)) < 200)
    assert abs(inked.mean() - 30) < 4  # vertically centred on its row
    for edge in (titled[:12], titled[-12:], titled[:, :12], titled[:, -12:]):
        assert edge.min() == 255


def test_small_images_are_enlarged_to_fit_their_column_labels():
    assert _readable_scale(8, 8, []) == 6
    assert _readable_scale(8, 8, ["a much longer one"]) > 6
    assert _readable_scale(224, 224, ["short"]) == 1
    assert _readable_scale(8, 8, ["x" * 200]) == 20


@pytest.mark.parametrize("last", [0.5, "0 drawn"])
def test_augmentation_grid_sorts_columns_by_weight_then_name_with_the_partner_last(tmp_path, last):
    levels = {name: torch.full((1, 1, 80, 80), value) for name, value in zip("oabp", (0.1, 0.2, 0.3, 0.4), strict=True)}
    path = augmentation_grid(
        levels["o"], levels["p"], {last: levels["b"], 0.25: levels["a"]}, ["cat"], tmp_path / "a.png"
    )
    row = read(path)[-42, -(12 + 4 * 80 + 2 * 16 + 4) :, 0]  # gaps: wide, narrow, wide
    assert [row[40], row[136], row[220], row[316]] == [26, 51, 76, 102]
    assert row[80:96].tolist() == [255] * 16


def test_augmentation_grid_without_partners_is_narrower(tmp_path):
    image = torch.zeros(1, 3, 80, 80)
    with_partner = read(augmentation_grid(image, image, {0.5: image}, ["cat"], tmp_path / "a.png"))
    without = read(augmentation_grid(image, None, {0.5: image}, ["cat"], tmp_path / "b.png"))
    assert with_partner.shape[1] - without.shape[1] == 80 + 16


def colours(picture):
    return {tuple(colour) for colour in np.unique(picture.reshape(-1, 3), axis=0).tolist()}


BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def test_curves_share_a_panel_only_with_a_ylabel(tmp_path):
    series = {r"$\with$": ([1, 2, 3], [0.5, 0.7, 0.8]), "without": ([1, 2, 3], [0.4, 0.6, float("nan")])}
    apart = curves(series, tmp_path / "apart.png", title=r"$\t$")
    shared = curves(series, tmp_path / "shared.png", "epoch", "accuracy")
    assert read(apart).shape[1] == 840
    assert read(shared).shape[1] == 550
    assert {BLUE, ORANGE} <= colours(read(shared))
    assert colours(read(apart)[:, :420]) & {BLUE, ORANGE} == {BLUE}
    assert colours(read(apart)[:, 420:]) & {BLUE, ORANGE} == {ORANGE}


def blue_columns(picture):
    """Return the columns of the picture that contain a pixel of the first colour."""
    return np.flatnonzero((picture == BLUE).all(2).any(0))


def test_intervals_have_the_given_width_around_their_mean(tmp_path):
    rows = {r"$\flow$": (1.0, 2.0)}, {"flow": (1.0, 1.0)}, {"flow": (1.0, float("inf")), "other": (3.0, 0.0)}
    wide, narrow, dots = (read(intervals({"all": r}, tmp_path / f"{i}.png", "gain")) for i, r in enumerate(rows))
    assert np.ptp(blue_columns(wide)) > 100  # the axis fits the data
    assert len(blue_columns(dots)) < 20  # two markers
    zero = (wide[wide.shape[0] // 2 - 8] < 100).all(1)
    place = np.flatnonzero(zero[blue_columns(wide).min() : blue_columns(wide).max()]).mean()
    assert abs(place / np.ptp(blue_columns(wide)) - 1 / 4) < 0.03  # 0 lies a quarter of the way from −1 to 3
    assert narrow.shape[1] == dots.shape[1]
    two = read(intervals({r"$\a": rows[0], "b": {"x": (0.0, 1.0)}}, tmp_path / "two.png", title="gains"))
    assert two.shape[1] == narrow.shape[1] + 360
    assert two.shape[0] == narrow.shape[0] == dots.shape[0] - 30


def test_title_is_wrapped_to_the_width_of_the_intervals(tmp_path):
    title = "gain in accuracy over the same training without it"
    picture = read(intervals({"axes": {"swin": (1.0, 1.0)}}, tmp_path / "a.png", title=title))
    assert (picture[:40, [*range(4), *range(-4, 0)]] == 255).all()  # blank edges, so the title is not cut off


def test_panels_of_intervals_have_separate_scales(tmp_path):
    picture = read(intervals({"wide": {"x": (0.0, 4.0)}, "narrow": {"x": (0.0, 1.0)}}, tmp_path / "two.png"))
    middle = picture.shape[1] // 2
    wide, narrow = (len(blue_columns(half)) for half in (picture[:, :middle], picture[:, middle:]))
    assert wide / narrow == pytest.approx(1, rel=0.1)


def test_panels_of_intervals_wrap_to_the_next_line(tmp_path):
    sizes = [
        read(intervals({str(i): {"x": (1.0, 1.0)} for i in range(n)}, tmp_path / f"{n}.png")).shape for n in (4, 7)
    ]
    assert sizes[1] == (2 * sizes[0][0], *sizes[0][1:])


def test_scatter_shows_every_class_in_its_colour_with_its_name(tmp_path):
    points, labels = np.random.default_rng(0).normal(size=(60, 2)) * 5, np.arange(60) % 3
    names = [r"$\ant$", "bee", "cat", "never seen"]
    picture = read(scatter(points, labels, names, tmp_path / "a.png", r"$\t$ " * 30, ("x", "y")))
    rgb = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in CLASS_COLOURS[:4]]
    assert colours(picture) >= set(rgb[:3])  # the names are opaque
    assert rgb[3] not in colours(picture)
    other = read(scatter(points, labels, ["x" * 60, *names[1:]], tmp_path / "b.png"))
    assert other.shape == picture.shape
    for edge in (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:], other[:, -3:]):
        assert edge.min() == 255


def test_scatter_of_many_classes_has_no_names(tmp_path):
    count = LEGEND_MOST + 1
    points, names = np.random.default_rng(0).normal(size=(count, 2)), [str(k) for k in range(count)]
    some = read(scatter(points[1:], np.arange(count)[1:], names, tmp_path / "some.png"))
    assert some.shape[1] == 640 + 4 * 110
    assert read(scatter(points, np.arange(count), names, tmp_path / "many.png")).shape[1] == 640


def test_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = image_grid(squares(1, 1, 1, 8, 8), tmp_path / "grid.png")
    old = path.read_bytes()

    def fail(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        image_grid(squares(1, 1, 1, 8, 8, seed=1), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_plots_do_not_import_pyplot():
    import subprocess
    import sys

    code = "import sys, flowaug.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = squares(2, 3, 1, 4, 4)
BAD = [
    (lambda p: image_grid(GOOD[0], p), r"shape \(3, 1, 4, 4\); expected \(rows, columns, 1 or 3, H, W\)"),
    (lambda p: image_grid(np.moveaxis(GOOD, 2, -1), p), r"expected \(rows, columns, 1 or 3, H, W\)"),
    (lambda p: image_grid(GOOD, p, ["a"]), r"1 row labels for 2 rows of images; expected one per row"),
    (lambda p: image_grid(GOOD, p, None, ["a"]), r"1 column labels for 3 columns"),
    (lambda p: image_grid(GOOD.astype(int), p), r"images are int64; expected uint8, or float in \[0, 1\]"),
    (lambda p: image_grid(GOOD * np.nan, p), r"images contain NaN"),
    (
        lambda p: augmentation_grid(GOOD[0], None, {0.5: GOOD[0, :2]}, "abc", p),
        r"shapes differ: .*'w = 0.5': \(2, 1",
    ),
    (lambda p: curves({}, p), r"series is empty: expected name: \(xs, ys\)"),
    (lambda p: intervals({}, p), r"panels \[\]: expected at least one non-empty group"),
    (lambda p: intervals({"a": {}}, p), r"panels \['a'\]: expected at least one non-empty group"),
    (lambda p: scatter(np.zeros((4, 3)), np.zeros(4, int), "ab", p), r"points have shape \(4, 3\), labels \(4,\)"),
    (lambda p: scatter(np.zeros((4, 2)), np.zeros(3, int), "ab", p), r"expected \(N, 2\) and \(N,\)"),
    (lambda p: curves({"loss": ([1, 2], [1])}, p), r"series \['loss'\]: .* as many xs as ys"),
]


@pytest.mark.parametrize(("draw", "message"), BAD)
def test_bad_input(tmp_path, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()
