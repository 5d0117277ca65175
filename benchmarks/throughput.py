"""Measure the speed of the flow in images per second.

    pip install .[dev] && python -m benchmarks.throughput  # about 20 minutes on two cores; writes throughput.md
    python -m benchmarks.throughput --flows mef_small --batches 64 --no-compile
    git clone https://github.com/changyi7231/MEF && python -m benchmarks.throughput --authors MEF

The flow is compared with a direct implementation of the same model, with the Glow of normflows and with the speed of
its convolutions alone (the roofline).

All forms of a row run in turn in one process, so that a slow phase of the machine affects all of them; the table shows
medians. The roofline is computed from the FLOPs of the flow's convolutions and the speed of one 3×3 convolution
(128 → 128 channels, 64 images of 16×16), in float32 and in bfloat16, measured in the same turns. A training step counts
as three passes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flowaug import create_flow
from flowaug.training.runtime import keep_freed_memory, machine_name
from tests import literal_flow

SHAPES = {"mef_tiny": (1, 28, 28), "mef_small": (3, 32, 32), "mef_base": (3, 32, 32)}
GLOW = {"mef_small": (12, 160)}  # steps and hidden channels of a Glow with as many parameters
AUTHORS = {"mef_base": (8, (8, 4, 2), 128)}  # steps per level, blocks by level and hidden channels of the authors
LARGEST = 1e12  # FLOPs of a batch above which only encode and decode are timed
PATIENCE, MOST = 12, 9  # maximum seconds and turns per row
PEER = "The authors' code is github.com/changyi7231/MEF at the sizes of mef_base; it may keep freed memory as well."
HEAD = "| flow | batch | form | encode | decode | encode + decode | training step | of roofline, each |"


def seconds(function) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def convolution(dtype: torch.dtype):
    """Return a function that runs one convolution, and its FLOPs."""
    x = torch.randn(64, 128, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1), 2 * x.numel() * weight[0].numel()


def convolution_flops(flow) -> int:
    """Return the FLOPs per image of the convolutions in one pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        flow.encode(torch.zeros(1, *flow.event_shape))
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))


def inference(encode, decode, x, z) -> dict:
    """Return the functions for encode, decode and both, without gradients."""
    passes = {"encode": lambda: encode(x), "decode": lambda: decode(z)}
    passes["both"] = lambda: decode(encode(x)[0])
    return {name: torch.no_grad()(function) for name, function in passes.items()}


def step(flow, x, encode):
    """Return a function that runs a forward and backward pass of the negative log-likelihood."""
    y = torch.zeros(len(x), dtype=torch.long)

    def run():
        z, ladj = encode(x)
        (-(flow.gaussians.log_prob(z, y) + ladj).mean()).backward()
        flow.zero_grad()

    return run


def with_dtype(flow, dtype):
    """Return the encode function of a flow in training form, with conditioners in ``dtype``."""

    def encode(x):
        flow.set_training_form(dtype)
        return flow.encode(x)

    return encode


def normflows_glow(shape, steps: int, hidden: int):
    """Create the multi-scale Glow of normflows with a base distribution without parameters to train."""
    import normflows

    channels, height, width = shape
    flows, merges, bases = [], [], []
    for i in range(3):
        blocks = [normflows.flows.GlowBlock(channels * 2 ** (4 - i), hidden) for _ in range(steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        merges += [normflows.flows.Merge()] if i > 0 else []
        scale = 2 ** (3 - i)
        latent = (channels * 2 ** (4 - i - (i > 0)), height // scale, width // scale)
        bases.append(normflows.distributions.DiagGaussian(latent, trainable=False))
    return normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)


def glow_work(x, steps: int, hidden: int) -> dict:
    """Return the functions to time for the Glow of normflows."""
    glow = normflows_glow(x.shape[1:], steps, hidden)
    with torch.no_grad():
        glow.log_prob(x, None)

    def train():
        (-glow.log_prob(x, None).mean()).backward()
        glow.zero_grad()

    passes = {"encode": lambda: glow.log_prob(x, None), "decode": lambda: glow.sample(len(x))}
    return {k: torch.no_grad()(f) for k, f in passes.items()} | {"train": train}


def authors_mef(clone: Path, shape, steps: int, blocks: tuple[int, ...], hidden: int):
    """Create the flow in the code that Xiao & Liu released.

    Their ``Model`` has the same number of blocks at every level, so the levels are replaced afterwards.
    """
    sys.path.insert(0, str(clone))
    from models import nets

    channels, size = shape[0], shape[1]
    model = nets.Model(len(blocks), [steps] * len(blocks), "matrixexp", "matrixexp", 0, hidden, size, channels)
    for level, depth in enumerate(blocks):
        channels, size = channels * (4 if level == 0 else 2), size // 2
        flows = (nets.Flow("matrixexp", "matrixexp", depth, channels, hidden, size) for _ in range(steps))
        model.blocks[level] = nets.Sequential(*flows)
    return model


def authors_work(clone: Path, x, *sizes) -> dict:
    """Return the functions to time for the authors' code."""
    model = authors_mef(clone, x.shape[1:], *sizes)
    with torch.no_grad():
        model(x, init=True)
        z = model(x)[0]

    def train():
        z, ladj = model(x)
        (z.square().sum((1, 2, 3)) / 2 - ladj).mean().backward()
        model.zero_grad()

    return inference(model, lambda z: model(z, reverse=True), x, z) | {"train": train}


@torch.no_grad()
def check_compiled(frozen, x, z) -> None:
    """Check the values of the compiled flow: the tests trace it but do not compile it."""
    torch.testing.assert_close(frozen.encode(x)[0], z, rtol=0, atol=1e-3)
    torch.testing.assert_close(frozen.decode(z), x, rtol=0, atol=1e-4)


def forms_of(flow, x, compiled: bool) -> dict[str, dict]:
    """Return the functions to time, by form and pass."""
    with torch.no_grad():
        z = flow.encode(x)[0]
    bf16 = torch.bfloat16
    twin = (lambda x: literal_flow.encode(flow, x)), (lambda z: literal_flow.decode(flow, z))
    forms = {"literal twin": inference(*twin, x, z) | {"train": step(flow, x, twin[0])}}
    for name, dtype in (("float32", None), ("bfloat16 conditioner", bf16)):
        frozen = flow.freeze(dtype)
        forms[name] = inference(frozen.encode, frozen.decode, x, z)
        forms[name]["train"] = step(flow, x, with_dtype(flow, dtype))
        if compiled:
            frozen = flow.freeze(dtype, compiled=True)
            if dtype is None:
                check_compiled(frozen, x, z)
            forms[name + ", compiled"] = inference(frozen.encode, frozen.decode, x, z)
    return forms


def measure(forms: dict) -> dict:
    """Return the median seconds of every pass of every form, and the speed of a convolution in FLOPs per second."""
    convs = {name: convolution(getattr(torch, name)) for name in ("float32", "bfloat16")}
    work = {("conv", name): torch.no_grad()(function) for name, (function, _) in convs.items()}
    work |= {(form, name): function for form, passes in forms.items() for name, function in passes.items()}

    times = {key: [] for key in work}
    warmup = sum(seconds(function) for function in work.values())
    began, least = time.perf_counter(), 2 if warmup < 10 * PATIENCE else 1
    while (turns := len(times["conv", "float32"])) < least or (turns < MOST and time.perf_counter() - began < PATIENCE):
        for key, function in work.items():
            times[key].append(seconds(function))
    medians = {key: torch.tensor(values).median().item() for key, values in times.items()}
    return medians | {("speed", name): flops / medians["conv", name] for name, (_, flops) in convs.items()}


def rows(name: str, batch: int, compiled: bool, authors: Path | None) -> list[str]:
    """Return the table rows for one flow and one batch size."""
    flow = create_flow(name, event_shape=SHAPES[name], num_classes=10)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *flow.event_shape, generator=generator)
    flow.initialise(torch.rand(32, *flow.event_shape, generator=generator))
    flops, forms = convolution_flops(flow), forms_of(flow, x, compiled)
    if name in GLOW:
        forms["normflows Glow"] = glow_work(x, *GLOW[name])
    if authors and name in AUTHORS:
        forms["authors' code"] = authors_work(authors, x, *AUTHORS[name])
    if batch * flops > LARGEST:
        forms = {form: {k: f for k, f in passes.items() if k in ("encode", "decode")} for form, passes in forms.items()}

    times, lines = measure(forms), []
    costs = {"encode": 1, "decode": 1, "both": 2, "train": 3}  # in passes
    for form, passes in forms.items():
        dtype = "bfloat16" if "bfloat16" in form else "float32"
        rates = {k: batch / times[form, k] for k in passes}
        fractions = {k: rate * flops * costs[k] / times["speed", dtype] for k, rate in rates.items()}
        cells = [f"{rates[k]:.1f}" if k in rates else "" for k in costs]
        roofline = "" if "Glow" in form else " / ".join(f"{fractions[k]:.2f}" for k in costs if k in fractions)
        lines.append(f"| {name} | {batch} | {form} | {' | '.join(cells)} | {roofline} |")

    speeds = [times["speed", d] / 1e9 for d in ("float32", "bfloat16")]
    limit = f"{1e9 * speeds[0] / flops:.1f} ({speeds[0]:.0f} GFLOP/s), bfloat16 {1e9 * speeds[1] / flops:.1f}"
    return [*lines, f"| {name} | {batch} | convolutions alone | {limit} ({speeds[1]:.0f}) | | | | |"]


def milliseconds_per_image(size: int, batch: int) -> float:
    """Return the median milliseconds per image of encoding with ``mef_small``."""
    flow = create_flow("mef_small", event_shape=(3, size, size), num_classes=10, coupling="affine").freeze()
    x = torch.rand(batch, *flow.event_shape)
    encode = torch.no_grad()(lambda: flow.encode(x))
    encode()
    return 1e3 * torch.tensor([seconds(encode) for _ in range(5)]).median().item() / batch


def growth() -> list[str]:
    """Return the table rows with the milliseconds per image and per 1000 pixels, by image and batch size."""
    lines = []
    for size, batch in ((16, 64), (32, 16), (32, 64), (32, 256), (64, 16), (64, 64)):
        each = milliseconds_per_image(size, batch)
        lines.append(f"| {size}×{size} | {batch} | {each:.2f} | {1000 * each / size**2:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=(8, 64, 256))
    parser.add_argument("--no-compile", action="store_true", help="do not time the compiled forms")
    parser.add_argument("--authors", type=Path, help="clone of github.com/changyi7231/MEF, to compare with mef_base")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    keep_freed_memory()
    table = []
    for name in args.flows:
        for batch in args.batches:
            compiled = not args.no_compile and batch == 64  # compilation takes long for each batch size
            table += (lines := rows(name, batch, compiled, args.authors))
            print(*lines, sep="\n", flush=True)
    args.output.write_text(f"""# Speed of the flow engine

`python -m benchmarks.throughput{" --authors MEF" if args.authors else ""}`, {time.strftime("%Y-%m-%d")},
{machine_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}. Images per second; matrix-exponential
couplings, random weights. The last column is the fraction of the roofline (the convolutions alone) that encode / decode
/ encode + decode / training step reach. {PEER if args.authors else ""}

{HEAD}
|---|---|---|---|---|---|---|---|
{chr(10).join(table)}

## Cost against batch and pixels

`mef_small`, affine coupling, frozen, float32, encode.

| image | batch | ms per image | ms per 1000 pixels |
|---|---|---|---|
{chr(10).join(growth())}
""")


if __name__ == "__main__":
    main()
