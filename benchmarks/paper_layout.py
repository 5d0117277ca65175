"""Tables of ``paper_tables.py`` in the layout of the papers, with the published values on CIFAR."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flowaug.files import markdown_table


class Draw(NamedTuple):
    """One set of samples, or the real images.

    Attributes:
        flow: name of the flow in ``kld_sweep.py``.
        temperature: factor of the covariance.
        rfcm: sample from re-estimated full class covariances (RFCM) instead of the class Gaussians.
    """

    flow: str
    temperature: float = 1.0
    rfcm: bool = False


WEIGHTS = (1, 10, 30, 100, 300, 1000, 3000, 10_000)
REAL = Draw("real training images")
MIDDLE = 300  # λ' of the ablations
TEMPERATURES = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7)
METRICS = {"nf_acc": "NF-Acc ↑", "bits_per_dim": "bits/dim ↓", "cnn_a": "CNN-A ↑", "fid": "FID ↓"}
METRICS |= {"density": "density ↑", "coverage": "coverage ↑", "label_reliability": "L-R ↑"}
PERCENT = ("nf_acc", "cnn_a", "coverage", "label_reliability")
DRAWN = tuple(metric for metric in METRICS if metric not in ("nf_acc", "bits_per_dim"))
PAPERS = {  # published values, in percent except for the FID
    "λ (NFPI, Table 2)": {
        "nf_acc": {10: 39.48, 50: 63.58, 100: 66.87, 200: 69.29, 300: 70.42, 500: 70.08},
        "cnn_a": {10: 31.37, 50: 44.57, 100: 46.38, 200: 43.72, 300: 42.65, 500: 37.27},
    },
    "temperature (GLEM, Table 5)": {
        "cnn_a": (42.99, 43.63, 44.64, 45.22, 44.99, 44.17, 49.74),
        "fid": (30.15, 28.17, 26.90, 26.33, 26.45, 27.21, 25.55),
        "coverage": (16.13, 17.21, 18.47, 19.15, 19.33, 19.19, 22.47),
        "label_reliability": (26.82, 28.92, 30.86, 32.51, 33.67, 34.69, 33.56),
    },
    "learned (NFPI, Table 3)": (
        (77.31, 62.1, 39.16, 23.03),
        (93.2, 74.76, 71.65, 37.02),
        (88.75, 61.94, 57.76, 30.58),
        (93.63, 73.03, 70.42, 42.65),
    ),
    "RFCM (GLEM, Table 6)": {
        "cnn_a": (45.22, 49.74),
        "fid": (26.33, 25.55),
        "coverage": (19.15, 22.47),
        "label_reliability": (32.51, 33.56),
    },
}


def by_weight(weight: int) -> str:
    """Return the name of the flow with this λ' in ``kld_sweep.py``."""
    return f"FPI, λ' = {weight}"


LEARNED = {
    "#1: without KLD (data)": "data",
    "#2: KLD on means": by_weight(MIDDLE),
    "#3: KLD on variances": f"FPI, variances, λ' = {MIDDLE}",
    "#4: KLD on both": f"FPI, means and variances, λ' = {MIDDLE}",
}


def all_draws(weights: Iterable[int]) -> list[Draw]:
    """Return all sets of samples that the tables need, the most informative ones first."""
    names = dict.fromkeys([*LEARNED.values(), *map(by_weight, weights)])
    whole = [Draw(name, 1.0, rfcm) for rfcm in (False, True) for name in names]
    return list(dict.fromkeys([REAL, *whole, *(Draw(by_weight(MIDDLE), t) for t in TEMPERATURES)]))


Results = Mapping[Draw, Mapping[str, float]]


def cell(results: Results, draw: Draw, metric: str) -> str:
    """Return a value in the papers' format, or a dash if there is none."""
    value = results.get(draw, {}).get(metric)
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if metric in PERCENT else f"{value:.3g}"


def weight_table(results: Results, weights: Iterable[int]) -> str:
    """Return the table of all metrics by λ', and the published values by λ (NFPI, Table 2)."""
    draws = {f"λ' = {weight}": Draw(by_weight(weight)) for weight in sorted(weights)} | {"real images": REAL}
    rows = ([name, *(cell(results, d, m) for d in draws.values())] for m, name in METRICS.items())
    ours = markdown_table(["", *draws], rows)
    published = PAPERS["λ (NFPI, Table 2)"]
    rows = ([METRICS[metric], *(f"{v:g}" for v in values.values())] for metric, values in published.items())
    theirs = markdown_table(["NFPI, CIFAR-100", *(f"λ = {weight}" for weight in published["nf_acc"])], rows)
    return f"## λ' (NFPI, Table 2; GLEM, Table 3)\n\n{ours}\n\n{theirs}"


def learned_table(results: Results) -> str:
    """Return the table of all metrics by learned parameters, with the published values (NFPI, Table 3)."""
    published = PAPERS["learned (NFPI, Table 3)"]
    head = [
        "setting",
        *METRICS.values(),
        *(f"{data} {m}" for data in ("CIFAR-10", "CIFAR-100") for m in ("NF-A", "CNN-A")),
    ]
    rows = [
        [name, *(cell(results, Draw(flow), metric) for metric in METRICS), *map(str, numbers)]
        for (name, flow), numbers in zip(LEARNED.items(), published, strict=True)
    ]
    title = f"## Means, variances or both, λ' = {MIDDLE} (NFPI, Table 3, in the last four columns)"
    return f"{title}\n\n{markdown_table(head, rows)}"


def temperature_table(results: Results) -> str:
    """Return the table of the metrics of samples by temperature and with RFCM, and published values (GLEM, Table 5)."""
    draws = [*(Draw(by_weight(MIDDLE), t) for t in TEMPERATURES), Draw(by_weight(MIDDLE), 1.0, True)]
    rows = []
    for metric in DRAWN:
        rows.append([METRICS[metric], *(cell(results, draw, metric) for draw in draws)])
        if published := PAPERS["temperature (GLEM, Table 5)"].get(metric):
            rows.append([f"GLEM, CIFAR-100: {METRICS[metric]}", *(f"{value:g}" for value in published)])
    head = ["τ", *(f"{t:g}" for t in TEMPERATURES), "RFCM"]
    return f"## Temperature (GLEM, Table 5), λ' = {MIDDLE}\n\n{markdown_table(head, rows)}"


def rfcm_table(results: Results, weights: Iterable[int]) -> str:
    """Return the table of the metrics of samples without → with RFCM, and published values (GLEM, Table 6)."""
    names = dict.fromkeys([*LEARNED.values(), *map(by_weight, sorted(weights))])
    rows = [
        [name, *(" → ".join(cell(results, Draw(name, 1.0, on), m) for on in (False, True)) for m in DRAWN)]
        for name in names
    ]
    published = PAPERS["RFCM (GLEM, Table 6)"]
    theirs = [" → ".join(f"{v:g}" for v in published[m]) if m in published else "–" for m in DRAWN]
    head = ["flow", *(METRICS[metric] for metric in DRAWN)]
    return f"## RFCM off → on (GLEM, Table 6)\n\n{markdown_table(head, [*rows, ['GLEM, CIFAR-100, λ = 10', *theirs]])}"
