"""What flow mixup costs: its share of a classifier's training step, and the share of the mixing in it.

    python benchmarks/overhead.py            # about ten minutes on two cores; writes overhead.md
    python benchmarks/overhead.py --models swin_tiny_patch4_window7_224 --repeats 3

Transform and step are timed in turn in one process. A batch that does not fit in memory runs as micro-batches of 8, as
gradient accumulation would. Weights are random: they change no time.
"""

import argparse
import time
from pathlib import Path

import timm
import torch

from flowaug import ClasswisePCA, FlowMixupTransform, create_flow, mix_latents
from flowaug.training.runtime import machine_name

MODELS = ("swin_tiny_patch4_window7_224", "eva02_base_patch14_448")
CLASSES, RANK, MICRO = 1000, 32, 8
PATIENCE = 60  # seconds after which no further pair is begun


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def random_pca(dim: int) -> ClasswisePCA:
    """Axes of the size of ImageNet's: K = 1000, R = 32, 20 training images per class in the table."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(CLASSES, RANK, dim, generator=generator) / dim**0.5
    coords = torch.randn(20 * CLASSES, RANK, generator=generator).half()
    offsets = torch.arange(CLASSES + 1) * 20
    return ClasswisePCA(axes, torch.ones(CLASSES, RANK), torch.zeros(CLASSES, dim), coords, offsets)


def make_transform() -> FlowMixupTransform:
    flow = create_flow("mef_small", event_shape=(3, 32, 32), num_classes=CLASSES)
    flow.initialise(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return FlowMixupTransform(flow, random_pca(flow.dim), max_outside=1.0)


def training_step(model, x, y) -> None:
    """Forward, backward and update in micro-batches."""
    for a, b in zip(x.split(MICRO), y.split(MICRO), strict=True):
        torch.nn.functional.cross_entropy(model(a), b).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(1e-6 * p.grad)
            p.grad = None


def share_of_step(name: str, batch: int, transform: FlowMixupTransform, repeats: int) -> tuple[float, ...]:
    """Median seconds of transform and step, median share of the transform in both, and the number of pairs."""
    model = timm.create_model(name, num_classes=CLASSES).train()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, *model.default_cfg["input_size"], generator=generator)
    y = torch.randint(0, CLASSES, (batch,), generator=generator)
    transform(x, y)
    training_step(model, x[:MICRO], y[:MICRO])
    work = (lambda: transform(x, y), lambda: training_step(model, x, y))
    pairs, began = [], time.perf_counter()
    while not pairs or (len(pairs) < repeats and time.perf_counter() - began < PATIENCE):
        pairs.append([seconds(part) for part in work])
    pairs = torch.tensor(pairs)
    shares = pairs[:, 0] / pairs.sum(1)
    return *pairs.median(0).values.tolist(), shares.median().item(), len(pairs)


def share_of_mixing(transform: FlowMixupTransform, repeats: int) -> tuple[float, float]:
    """Median seconds of mixing 64 latents, and its share of encode, mix and decode of the same 64."""
    y = torch.randint(0, CLASSES, (64,), generator=torch.Generator().manual_seed(2))
    x, plan = torch.rand(64, *transform.flow.event_shape), transform.plan(y.repeat(3))
    plan = type(plan)(torch.arange(64), plan.weight[:64], transform.pca.offsets[y])
    with torch.no_grad():
        z = transform.flow.encode(x)[0]
        mixing = torch.tensor([seconds(lambda: mix_latents(z, y, transform.pca, plan)) for _ in range(5 * repeats)])
        whole = torch.tensor([seconds(lambda: transform.apply(x, y, plan)) for _ in range(repeats)])
    return mixing.median().item(), (mixing.median() / whole.median()).item()


def report(rows: list[str], repeats: int, mixing: float, share: float) -> str:
    return f"""# Cost of flow mixup in a training step

`python benchmarks/overhead.py`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()} threads,
torch {torch.__version__}, float32. Flow `mef_small` at 32×32×3, K = {CLASSES}, R = {RANK}, p = 0.5; medians of
up to {repeats} pairs; steps run in micro-batches of {MICRO}.

| classifier | batch | transform, s | training step, s | share of both | pairs |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Mixing alone (without encode and decode) of 64 latents: {1000 * mixing:.1f} ms, {100 * share:.1f} % of the transform.
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
            transform_s, step_s, share, count = share_of_step(name, batch, transform, args.repeats)
            rows.append(f"| {name} | {batch} | {transform_s:.3f} | {step_s:.2f} | {100 * share:.2f} % | {count} |")
            print(rows[-1], flush=True)
    args.output.write_text(report(rows, args.repeats, *share_of_mixing(transform, args.repeats)))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
