"""Solvers of the class Gaussians: steps to convergence, seconds and memory at ImageNet's size, and two peers.

    python benchmarks/gaussians.py            # about 4 minutes on 2 cores; writes benchmarks/gaussians.md

The statistics are random: means of spread 0.5, variances uniform in [0.3, 1.2], 1300 samples per class. The peers
are Anderson acceleration of the damped iteration, and a sweep of the same equations written out over tensors of
shape (K, K, D) in float32, the formulation of the authors' release (in our words).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from flowaug.files import markdown_table
from flowaug.latents.estimators import fpi
from flowaug.latents.estimators.fpi import VARIANCE_BOUNDS, make_balance
from flowaug.latents.estimators.problem import Balance
from flowaug.latents.moments import ClassMoments
from flowaug.training.runtime import machine_name

BOTH, MEANS = ("mean", "variance"), ("mean",)
SETTINGS = {"means, unit variances": (MEANS, "unit"), "means and variances": (BOTH, "data")}
WEIGHTS = (1, 10, 100, 1000, 10000)
SIZES = ((10, 64), (10, 3072), (100, 3072))
LARGE = ((MEANS, "unit", 10), (MEANS, "unit", 100), (BOTH, "data", 1), (BOTH, "data", 10))


def random_moments(k: int, d: int, seed: int = 0, n: int = 1300) -> ClassMoments:
    generator = torch.Generator().manual_seed(seed)
    total = torch.randn(k, d, generator=generator, dtype=torch.float64).mul_(0.5 * n)
    squares = torch.rand(k, d, generator=generator, dtype=torch.float64).mul_(0.9 * n).add_(0.3 * n)
    return ClassMoments(torch.full((k,), n), total, squares.addcmul_(total, total, value=1 / n))


def balance_of(moments: ClassMoments, learn, variance, kld_weight, dtype=torch.float64) -> tuple[Balance, torch.Tensor]:
    options = {"alpha": 10.0, "pi": "pair", "variance_bounds": VARIANCE_BOUNDS}
    return make_balance(moments, kld_weight=kld_weight, learn=learn, variance=variance, dtype=dtype, **options)


def anderson(balance, x, damp=0.5, memory=5, tol=1e-4, max_steps=1000) -> tuple[int, float]:
    """Anderson acceleration of the damped iteration; where the residual rises, one damped step and a new start."""
    moved, changed, last, point = [], [], None, balance.evaluate(x)
    for steps in range(max_steps):
        if point.residual <= tol:
            return steps, point.residual
        here, step = point.height.x, point.step
        if last is not None:
            moved, changed = [*moved, here - last[0]][-memory:], [*changed, step - last[1]][-memory:]
        last, following = (here, step), here + damp * step
        if changed:
            basis = torch.stack([c.flatten() for c in changed], 1)
            share = torch.linalg.lstsq(basis, step.reshape(-1, 1)).solution.flatten()
            for s, m, c in zip(share, moved, changed, strict=True):
                following = following - s * (m + damp * c)
        trial = balance.evaluate(balance.project(following))
        if changed and not trial.residual <= point.residual:
            moved, changed, last = [], [], None
            trial = balance.evaluate(balance.project(here + damp * step))
        point = trial
    return max_steps, point.residual


def literal_sweep(mean, variance, data_mean, data_variance, kld_weight, alpha):
    """One sweep of Eq. (5) and (6), π = pair, over tensors of shape (K, K, D)."""
    k = len(mean)
    delta = mean[:, None] - mean[None]
    own, other = variance[:, None].expand(k, k, -1), variance[None].expand(k, k, -1)
    kld = 0.5 * (own / other + delta.square() / other - 1 + other.log() - own.log()).sum(2)
    weight = kld_weight * math.exp(-1 / alpha) / (alpha * kld.fill_diagonal_(1.0))
    given, taken = weight.fill_diagonal_(0.0)[:, :, None], weight.T[:, :, None]
    push = variance * ((given / other + taken / own) * delta).sum(1)
    a = (1 + given.sum(1)) / variance + (taken * (delta.square() + other)).sum(1) / variance.square()
    b = data_variance + (data_mean - mean).square() + variance.square() * (given / other).sum(1)
    b += variance * taken.sum(1)
    return data_mean + push, (b / a).sqrt()


def seconds(call, repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def convergence_rows(max_steps: int):
    """Steps and residual of the three solvers for every size, setting and weight."""
    for k, d in SIZES:
        moments = random_moments(k, d)
        for setting, (learn, variance) in SETTINGS.items():
            for weight in WEIGHTS:
                options = {"kld_weight": weight, "learn": learn, "variance": variance, "max_steps": max_steps}
                ours, plain = fpi(moments, **options), fpi(moments, memory=0, **options)
                other = anderson(*balance_of(moments, learn, variance, weight), max_steps=max_steps)
                cells = [_cell(ours.steps, ours.residual), _cell(*other), _cell(plain.steps, plain.residual)]
                print(k, d, setting, weight, *cells, sep=" | ", flush=True)
                yield [k, d, setting, weight, *cells]


def _cell(steps: int, residual: float) -> str:
    return f"{steps}" if residual <= 1e-4 else f"not in {steps} ({residual:.0e})"


def large_rows(k: int = 1000, d: int = 4096):
    """Full solves, each in a process of its own for the sake of its peak memory."""
    for learn, variance, weight in LARGE:
        arguments = ["--solve", json.dumps([k, d, learn, variance, weight])]
        out = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
        found = json.loads(out.stdout)
        cells = [found["steps"], f"{found['residual']:.1e}", f"{found['seconds']:.0f}", f"{found['peak']:.2f}"]
        print(learn, variance, weight, *cells, flush=True)
        yield [" and ".join(learn), variance, weight, *cells]


def solve(k: int, d: int, learn: list[str], variance: str, weight: float) -> dict[str, float]:
    moments = random_moments(k, d)
    start = time.perf_counter()
    found = fpi(moments, kld_weight=weight, learn=tuple(learn), variance=variance)
    passed = time.perf_counter() - start
    return {"steps": found.steps, "residual": found.residual, "seconds": passed, "peak": peak_memory()}


def peak_memory() -> float:
    """Peak resident GiB of this process alone; `getrusage` would start from its parent's."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20


def iteration_rows(k: int = 1000, d: int = 4096):
    """One evaluation of Eq. (5) and (6) for means and variances, against the products it contains."""
    moments = random_moments(k, d)
    for dtype in (torch.float32, torch.float64):
        balance, x = balance_of(moments, BOTH, "data", 10.0, dtype)
        wide, matrix, weights = x[0], x[0].to(dtype), torch.rand(k, k, dtype=dtype)
        bare = seconds(lambda wide=wide: (wide @ wide.T, wide @ wide.T))
        bare += seconds(lambda w=weights, m=matrix: (w @ m, w @ m, w.T @ m, w.T @ m))
        whole = seconds(lambda balance=balance, x=x: balance.evaluate(x))
        yield [str(dtype).removeprefix("torch."), f"{whole:.2f}", f"{bare:.2f}", f"{whole / bare:.2f}"]


def peer_row(k: int = 100, d: int = 3072):
    moments = random_moments(k, d)
    balance, x = balance_of(moments, BOTH, "data", 10.0, torch.float32)
    start, data = balance.value(x), balance.data
    single = [t.float() for t in (*start, *data)]
    literal = seconds(lambda: literal_sweep(*single, 10.0, 10.0), repeats=3)
    ours = seconds(lambda: balance.evaluate(x))
    mean, variance = literal_sweep(*(t.double() for t in (*start, *data)), 10.0, 10.0)
    step = balance.evaluate(x).step.double()
    error = max(float((x[0] + step[0] - mean).abs().max()), float(((x[1] + step[1]).exp() - variance).abs().max()))
    return [f"{literal * 1e3:.0f}", f"{ours * 1e3:.1f}", f"{literal / ours:.0f}", f"{error:.0e}"]


def report(max_steps: int) -> str:
    before, sizes, bare, peer = peak_memory(), list(large_rows()), list(iteration_rows()), peer_row()
    steps = list(convergence_rows(max_steps))
    threads = torch.get_num_threads()
    return f"""# Solvers of the class Gaussians

`python benchmarks/gaussians.py`, {datetime.date.today()}, {machine_name()}, {threads} threads, torch
{torch.__version__}. Random statistics (means of spread 0.5, variances in [0.3, 1.2]), α = 10, π = pair, variance
bounds {VARIANCE_BOUNDS}, tolerance 1e-4 on the residual.

## Steps to a residual of 1e-4

Ours is a projected L-BFGS with memory 4 whose metric is the step along each coordinate, that of Eq. (5) for means and,
where variances are learned, that to the coordinate's minimum; refused trials count as steps.
Anderson has memory 5 and the same damping of ½; plain is the damped iteration.

{markdown_table(["K", "D", "learned", "λ'", "ours", "Anderson", "plain"], steps)}

## K = 1000, D = 4096: full solves

Peak memory is that of the whole process, Python and torch included ({before:.2f} GiB before any work).

{markdown_table(["learned", "initial variances", "λ'", "steps", "residual", "seconds", "peak GiB"], sizes)}

## K = 1000, D = 4096: one evaluation of Eq. (5) and (6) against the six bare products in it

Divergences and data term are float64 in both rows; the forces are float32 for tolerances down to 1e-5, float64
below.

{markdown_table(["forces", "evaluation, s", "bare products, s", "ratio"], bare)}

## K = 100, D = 3072: one sweep against tensors of shape (K, K, D)

{markdown_table(["(K, K, D) float32, ms", "ours, ms", "faster by", "largest difference of the sweep"], [peer])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=1000, help="steps allowed in the convergence table")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--solve", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.solve:
        print(json.dumps(solve(*arguments.solve)))
    else:
        text = report(arguments.max_steps)
        arguments.output.write_text(text)
        print(text)


if __name__ == "__main__":
    main()
