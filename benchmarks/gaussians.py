"""Benchmark the solver of the class Gaussians: steps to convergence, and time and memory at ImageNet's size.

    python benchmarks/gaussians.py            # about 4 minutes on 2 cores; writes benchmarks/gaussians.md

The moments are random: means with standard deviation 0.5, variances uniform in [0.3, 1.2], 1300 images per class. The
solver is compared with Anderson acceleration of the damped iteration, and with one sweep of the same equations over
float32 tensors of shape (K, K, D), the formulation of the authors' release (own implementation).
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
from flowaug.latents.estimators.fpi import VARIANCE_BOUNDS, make_problem
from flowaug.latents.estimators.problem import Problem
from flowaug.latents.moments import ClassMoments
from flowaug.training.runtime import machine_name

BOTH, MEANS = ("mean", "variance"), ("mean",)
SETTINGS = {"means, unit variances": (MEANS, "unit"), "means and variances": (BOTH, "data")}
WEIGHTS = (1, 10, 100, 1000, 10000)
SIZES = ((10, 64), (10, 3072), (100, 3072))
LARGE = ((MEANS, "unit", 10), (MEANS, "unit", 100), (BOTH, "data", 1), (BOTH, "data", 10))


def random_moments(k: int, d: int, seed: int = 0, n: int = 1300) -> ClassMoments:
    """Return random moments of K = k classes in D = d dimensions, with n images per class."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.randn(k, d, generator=generator, dtype=torch.float64).mul_(0.5 * n)
    squares = torch.rand(k, d, generator=generator, dtype=torch.float64).mul_(0.9 * n).add_(0.3 * n)
    return ClassMoments(torch.full((k,), n), total, squares.addcmul_(total, total, value=1 / n))


def problem_of(moments: ClassMoments, learn, variance, kld_weight, dtype=torch.float64) -> tuple[Problem, torch.Tensor]:
    """Return the fixed-point problem and its initial state."""
    options = {"alpha": 10.0, "pi": "pair", "variance_bounds": VARIANCE_BOUNDS}
    return make_problem(moments, kld_weight=kld_weight, learn=learn, variance=variance, dtype=dtype, **options)


def anderson(problem, x, damp=0.5, memory=5, tol=1e-4, max_steps=1000) -> tuple[int, float]:
    """Solve by Anderson acceleration of the damped iteration.

    Where the residual would increase, a damped step is taken instead and the memory is cleared.

    Returns:
        Number of steps and final residual.
    """
    state_changes, step_changes = [], []
    last, point = None, problem.evaluate(x)
    for steps in range(max_steps):
        if point.residual <= tol:
            return steps, point.residual

        here, step = point.terms.x, point.step
        if last is not None:
            state_changes = [*state_changes, here - last[0]][-memory:]
            step_changes = [*step_changes, step - last[1]][-memory:]
        last, following = (here, step), here + damp * step
        if step_changes:
            basis = torch.stack([change.flatten() for change in step_changes], 1)
            coefficients = torch.linalg.lstsq(basis, step.reshape(-1, 1)).solution.flatten()
            for c, dx, ds in zip(coefficients, state_changes, step_changes, strict=True):
                following = following - c * (dx + damp * ds)

        trial = problem.evaluate(problem.project(following))
        if step_changes and not trial.residual <= point.residual:
            state_changes, step_changes, last = [], [], None
            trial = problem.evaluate(problem.project(here + damp * step))
        point = trial
    return max_steps, point.residual


def literal_sweep(mean, variance, data_mean, data_variance, kld_weight, alpha):
    """Return means and variances after one sweep of Eq. (5) and (6) with π = pair, over tensors of shape (K, K, D)."""
    k = len(mean)
    delta = mean[:, None] - mean[None]
    own, other = variance[:, None].expand(k, k, -1), variance[None].expand(k, k, -1)
    kld = 0.5 * (own / other + delta.square() / other - 1 + other.log() - own.log()).sum(2)
    weight = kld_weight * math.exp(-1 / alpha) / (alpha * kld.fill_diagonal_(1.0))
    forward, backward = weight.fill_diagonal_(0.0)[:, :, None], weight.T[:, :, None]  # K_yy' and K_y'y

    push = variance * ((forward / other + backward / own) * delta).sum(1)
    a = (1 + forward.sum(1)) / variance + (backward * (delta.square() + other)).sum(1) / variance.square()
    b = data_variance + (data_mean - mean).square() + variance.square() * (forward / other).sum(1)
    b += variance * backward.sum(1)
    return data_mean + push, (b / a).sqrt()


def seconds(call, repeats: int = 5) -> float:
    """Return the minimum seconds of several calls, after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def convergence_rows(max_steps: int):
    """Yield the rows with steps and residual of the three solvers, for every size, setting and weight."""
    for k, d in SIZES:
        moments = random_moments(k, d)
        for setting, (learn, variance) in SETTINGS.items():
            for weight in WEIGHTS:
                options = {"kld_weight": weight, "learn": learn, "variance": variance, "max_steps": max_steps}
                ours, plain = fpi(moments, **options), fpi(moments, memory=0, **options)
                other = anderson(*problem_of(moments, learn, variance, weight), max_steps=max_steps)
                cells = [_cell(ours.steps, ours.residual), _cell(*other), _cell(plain.steps, plain.residual)]
                print(k, d, setting, weight, *cells, sep=" | ", flush=True)
                yield [k, d, setting, weight, *cells]


def _cell(steps: int, residual: float) -> str:
    return f"{steps}" if residual <= 1e-4 else f"not in {steps} ({residual:.0e})"


def large_rows(k: int = 1000, d: int = 4096):
    """Yield the rows of the full solves; each runs in its own process to measure its peak memory."""
    for learn, variance, weight in LARGE:
        arguments = ["--solve", json.dumps([k, d, learn, variance, weight])]
        out = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
        found = json.loads(out.stdout)
        cells = [found["steps"], f"{found['residual']:.1e}", f"{found['seconds']:.0f}", f"{found['peak']:.2f}"]
        print(learn, variance, weight, *cells, flush=True)
        yield [" and ".join(learn), variance, weight, *cells]


def solve(k: int, d: int, learn: list[str], variance: str, weight: float) -> dict[str, float]:
    """Return steps, residual, seconds and peak memory in GiB of a full solve."""
    moments = random_moments(k, d)
    start = time.perf_counter()
    found = fpi(moments, kld_weight=weight, learn=tuple(learn), variance=variance)
    elapsed = time.perf_counter() - start
    return {"steps": found.steps, "residual": found.residual, "seconds": elapsed, "peak": peak_memory()}


def peak_memory() -> float:
    """Return the peak resident set size of this process in GiB.

    ``/proc`` is preferred because ``getrusage`` includes the peak of the parent process before the fork.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20


def iteration_rows(k: int = 1000, d: int = 4096):
    """Yield the rows that compare one evaluation of Eq. (5) and (6), for means and variances, with its products."""
    moments = random_moments(k, d)
    for dtype in (torch.float32, torch.float64):
        problem, x = problem_of(moments, BOTH, "data", 10.0, dtype)
        wide, matrix, weights = x[0], x[0].to(dtype), torch.rand(k, k, dtype=dtype)
        products = seconds(lambda wide=wide: (wide @ wide.T, wide @ wide.T))
        products += seconds(lambda w=weights, m=matrix: (w @ m, w @ m, w.T @ m, w.T @ m))
        whole = seconds(lambda problem=problem, x=x: problem.evaluate(x))
        yield [str(dtype).removeprefix("torch."), f"{whole:.2f}", f"{products:.2f}", f"{whole / products:.2f}"]


def peer_row(k: int = 100, d: int = 3072):
    """Return the row that compares one sweep with ``literal_sweep``, in time and value."""
    moments = random_moments(k, d)
    problem, x = problem_of(moments, BOTH, "data", 10.0, torch.float32)
    start, data = problem.value(x), problem.data
    single = [t.float() for t in (*start, *data)]
    literal = seconds(lambda: literal_sweep(*single, 10.0, 10.0), repeats=3)
    ours = seconds(lambda: problem.evaluate(x))

    mean, variance = literal_sweep(*(t.double() for t in (*start, *data)), 10.0, 10.0)
    step = problem.evaluate(x).step.double()
    mean_error = float((x[0] + step[0] - mean).abs().max())
    variance_error = float(((x[1] + step[1]).exp() - variance).abs().max())
    error = max(mean_error, variance_error)
    return [f"{literal * 1e3:.0f}", f"{ours * 1e3:.1f}", f"{literal / ours:.0f}", f"{error:.0e}"]


def report(max_steps: int) -> str:
    """Run the benchmark and return the report as markdown."""
    before = peak_memory()
    sizes, products, peer = list(large_rows()), list(iteration_rows()), peer_row()
    steps = list(convergence_rows(max_steps))
    threads = torch.get_num_threads()
    return f"""# Solvers of the class Gaussians

`python benchmarks/gaussians.py`, {datetime.date.today()}, {machine_name()}, {threads} threads, torch
{torch.__version__}. Random moments (means with standard deviation 0.5, variances in [0.3, 1.2]), α = 10, π = pair,
variance bounds {VARIANCE_BOUNDS}, tolerance 1e-4 on the residual.

## Steps to a residual of 1e-4

"ours" is a projected L-BFGS with memory 4. Its initial metric is a coordinate-wise step: that of Eq. (5) for the means
and, where variances are learned, the step to the minimum along the coordinate. Rejected trial steps count.
"Anderson" has memory 5 and the same damping of ½. "plain" is the damped iteration.

{markdown_table(["K", "D", "learned", "λ'", "ours", "Anderson", "plain"], steps)}

## K = 1000, D = 4096: full solves

Peak memory is that of the whole process, including Python and torch ({before:.2f} GiB at the start).

{markdown_table(["learned", "initial variances", "λ'", "steps", "residual", "seconds", "peak GiB"], sizes)}

## K = 1000, D = 4096: one evaluation of Eq. (5) and (6) against its six matrix products alone

Divergences and data term are computed in float64 in both rows. The forces are computed in float32 for tolerances down
to 1e-5 and in float64 below.

{markdown_table(["forces", "evaluation, s", "products alone, s", "ratio"], products)}

## K = 100, D = 3072: one evaluation against tensors of shape (K, K, D)

{markdown_table(["(K, K, D) float32, ms", "ours, ms", "speedup", "largest difference"], [peer])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=1000, help="maximum steps in the convergence table")
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
