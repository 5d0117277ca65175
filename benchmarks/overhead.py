"""Measure the cost of flow mixup, as a fraction of a classifier's training step.

    python benchmarks/overhead.py            # about ten minutes on two cores; writes overhead.md
    python benchmarks/overhead.py --models swin_tiny_patch4_window7_224 --repeats 3

Transform and training step are timed alternately in one process. The step runs in micro-batches of 8, as with gradient
accumulation, because a larger batch may not fit in memory. Weights are random, which does not change the times.
"""

import argparse
import time
from pathlib import Path

import timm
import torch

from flowaug import ClasswisePCA, FlowMixupTransform, MixPlan, create_flow, mix_latents
from flowaug.training.runtime import machine_name

MODELS = ("swin_tiny_patch4_window7_224", "eva02_base_patch14_448")
CLASSES, RANK, MICRO = 1000, 32, 8
PATIENCE = 60  # seconds after which no more pairs are timed


def seconds(function) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def random_pca(dim: int) -> ClasswisePCA:
    """Return random class principal components of ImageNet's size: K = 1000, R = 32, with 20 images per class."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(CLASSES, RANK, dim, generator=generator) / dim**0.5
    coords = torch.randn(20 * CLASSES, RANK, generator=generator).half()
    offsets = torch.arange(CLASSES + 1) * 20
    return ClasswisePCA(axes, torch.ones(CLASSES, RANK), torch.zeros(CLASSES, dim), coords, offsets)


def make_transform() -> FlowMixupTransform:
    """Create flow mixup with random weights, one mixing weight per image and no rejection by pixel range."""
    flow = create_flow("mef_small", event_shape=(3, 32, 32), num_classes=CLASSES)
    flow.initialise(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    settings = {"alpha": 1.0, "per_axis": False, "rescaled": False, "max_outside": 1.0}
    return FlowMixupTransform(flow, random_pca(flow.dim), **settings)


def training_step(model, x, y) -> None:
    """Run forward and backward passes in micro-batches, then update the weights."""
    for a, b in zip(x.split(MICRO), y.split(MICRO), strict=True):
        torch.nn.functional.cross_entropy(model(a), b).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(1e-6 * p.grad)
            p.grad = None


def fraction_of_step(name: str, batch: int, transform: FlowMixupTransform, repeats: int) -> tuple[float, ...]:
    """Time transform and training step of a classifier.

    Args:
        name: timm model.
        batch: batch size.
        transform: flow mixup.
        repeats: maximum number of pairs (transform, step).

    Returns:
        Median seconds of the transform and of the step, median fraction of the transform in their sum, and the number
        of pairs.
    """
    model = timm.create_model(name, num_classes=CLASSES).train()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, *model.default_cfg["input_size"], generator=generator)
    y = torch.randint(0, CLASSES, (batch,), generator=generator)

    transform(x, y)  # warm-up
    training_step(model, x[:MICRO], y[:MICRO])
    work = (lambda: transform(x, y), lambda: training_step(model, x, y))
    pairs, began = [], time.perf_counter()
    while not pairs or (len(pairs) < repeats and time.perf_counter() - began < PATIENCE):
        pairs.append([seconds(part) for part in work])

    pairs = torch.tensor(pairs)
    fractions = pairs[:, 0] / pairs.sum(1)
    return *pairs.median(0).values.tolist(), fractions.median().item(), len(pairs)


def fraction_of_mixing(transform: FlowMixupTransform, repeats: int) -> tuple[float, float]:
    """Return the median seconds of mixing 64 latents, and their fraction of encoding, mixing and decoding 64 images."""
    y = torch.randint(0, CLASSES, (64,), generator=torch.Generator().manual_seed(2))
    x = torch.rand(64, *transform.flow.event_shape)
    weight = transform.plan(y.repeat(3)).weight[:64]  # 3 · 64 labels, of which about half get a weight
    plan = MixPlan(torch.arange(64), weight, transform.pca.offsets[y])
    with torch.no_grad():
        z = transform.flow.encode(x)[0]
        mixing = torch.tensor([seconds(lambda: mix_latents(z, y, transform.pca, plan)) for _ in range(5 * repeats)])
        whole = torch.tensor([seconds(lambda: transform.apply(x, y, plan)) for _ in range(repeats)])
    return mixing.median().item(), (mixing.median() / whole.median()).item()


def report(rows: list[str], repeats: int, mixing: float, fraction: float) -> str:
    """Return the report as markdown.

    Args:
        rows: rows of the table.
        repeats: maximum number of pairs.
        mixing: seconds of mixing 64 latents.
        fraction: their fraction of the transform.
    """
    return f"""# Cost of flow mixup in a training step

`python benchmarks/overhead.py`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()} threads,
torch {torch.__version__}, float32. Flow `mef_small` at 32×32×3, K = {CLASSES}, R = {RANK}, p = 0.5; medians of
up to {repeats} pairs of measurements; training steps run in micro-batches of {MICRO}.

| classifier | batch | transform, s | training step, s | fraction of both | pairs |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Mixing alone (without encode and decode) of 64 latents: {1000 * mixing:.1f} ms, {100 * fraction:.1f} % of the transform.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(8, 64))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    transform, rows = make_transform(), []
    for name in args.models:
        for batch in args.batches:
            transform_s, step_s, fraction, count = fraction_of_step(name, batch, transform, args.repeats)
            rows.append(f"| {name} | {batch} | {transform_s:.3f} | {step_s:.2f} | {100 * fraction:.2f} % | {count} |")
            print(rows[-1], flush=True)
    args.output.write_text(report(rows, args.repeats, *fraction_of_mixing(transform, args.repeats)))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
