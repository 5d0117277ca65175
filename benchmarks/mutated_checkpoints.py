"""Load checkpoints with random damage, accidental and hostile, and count what happens.

    python benchmarks/mutated_checkpoints.py        # some minutes on one core; writes MUTATED_CHECKPOINTS.md

The checkpoints are those of four small flows, one of each family, with class principal components. Each copy gets one
mutation of ``config.json``, of the bytes or the header of a safetensors file, or of its tensors. In four of five copies
the digest in ``config.json`` is then made right, as somebody who forges a checkpoint would do.
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from checkpoint_mutations import MUTATIONS

import flowaug
from flowaug import ClasswisePCA, FlowMixupTransform, create_flow, load_flow, load_pca, save_flow
from flowaug.training.runtime import machine_name

SECONDS = 10  # longer is a hang
SLACK = 32 * 2**20  # bytes that a load may use beyond six times the files
OUTCOMES = (
    "loaded, finite outputs",
    "refused, clear error",
    "raw traceback",
    "hang",
    "non-finite output",
    "allocation",
)
FLOWS = {
    "mef_tiny": ((1, 8, 8), {"steps": 1, "hidden": 8}),
    "glow_tiny": ((1, 8, 8), {"steps": 1, "hidden": 8}),
    "jet_tiny": ((2, 8, 8), {"couplings": 5, "width": 8}),
    "vector_tiny": ((12,), {"couplings": 2, "hidden": 8}),
}


class Result(NamedTuple):
    """What came of one mutated checkpoint.

    Attributes:
        kind: the kind of the mutation.
        outcome: one of ``OUTCOMES``.
        detail: the error, if there was one.
    """

    kind: str
    outcome: str
    detail: str


class Hang(BaseException):
    """A load takes too long."""


def write_bases(folder: Path) -> list[Path]:
    """Save one small flow of each family with its class principal components."""
    folders = []
    for name, (shape, overrides) in FLOWS.items():
        flow = create_flow(name, event_shape=shape, num_classes=3, **overrides).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            latents = [flow.encode(torch.rand(12, *shape, generator=generator))[0] for _ in range(3)]
        facts = {"class_names": ["ant", "bee", "cat"], "mixup": {"p": 0.5, "alpha": 0.3}, "recipe": {"dataset": None}}
        folders.append(save_flow(flow, folder / name, ClasswisePCA.fit(latents, 4), **facts))
    return folders


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def end(*_) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _use(folder: Path) -> bool:
    """Load flow and components, use them, and return whether all results are finite."""
    flow, pca = load_flow(folder), load_pca(folder)
    generator, y = torch.Generator().manual_seed(0), torch.arange(6) % flow.gaussians.num_classes
    x = torch.rand(6, *flow.event_shape, generator=generator)
    with torch.no_grad():
        z, ladj = flow.encode(x)
        draws = flow.gaussians.sample(y, generator=generator), pca.sample(y, generator=generator)
        results = [z, ladj, flow.log_prob(x, y), flow.log_prob(x), *draws, *map(flow.decode, draws)]
        if len(flow.event_shape) == 3:
            results.append(FlowMixupTransform.from_pretrained(folder, p=1.0)(x, y)[0])
    return all(bool(torch.isfinite(result).all()) for result in results)


def classify(folder: Path) -> tuple[str, str]:
    """Load a checkpoint and return one of ``OUTCOMES`` and the error."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts anew
    before = _memory("VmRSS")
    try:
        with _limited(SECONDS):
            outcome, detail = (OUTCOMES[0] if _use(folder) else "non-finite output"), ""
    except Hang:
        return "hang", ""
    except Exception as error:
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = Path(flowaug.__file__).parent in where.parents
        clear = ours and isinstance(error, ValueError | OSError) and str(folder) in str(error)
        outcome, detail = OUTCOMES[1] if clear else "raw traceback", f"{type(error).__name__}: {error}"
    used = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    return ("allocation", detail) if _memory("VmHWM") - before > 6 * used + SLACK else (outcome, detail)


def run(count: int, seed: int) -> list[Result]:
    """Load ``count`` mutated checkpoints.

    Args:
        count: number of mutations, evenly over the kinds.
        seed: seed of the mutations.
    """
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        bases = write_bases(Path(temporary))
        for base in bases:
            _use(base)  # what torch loads at the first use is not counted
        for i in range(count):
            rng = random.Random(f"{seed}-{i}")
            torch.manual_seed(i)
            kind = list(MUTATIONS)[i % len(MUTATIONS)]
            folder = Path(shutil.copytree(rng.choice(bases), Path(temporary) / f"copy{i}"))
            MUTATIONS[kind](folder, rng)
            results.append(Result(kind, *classify(folder)))
            shutil.rmtree(folder)
    return results


def report(results: list[Result], seed: int, seconds: float) -> str:
    """Format the counts as markdown."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for result in results:
        counts[result.kind][result.outcome] += 1
        counts["all"][result.outcome] += 1
    rows = [f"| {kind} | {' | '.join(str(counts[kind][o]) for o in OUTCOMES)} |" for kind in (*MUTATIONS, "all")]
    return f"""# Mutated checkpoints

`python benchmarks/mutated_checkpoints.py --count {len(results)} --seed {seed}`, {time.strftime("%Y-%m-%d")},
{machine_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {seconds:.0f} s in all. Copies of
four small flows, one of each family, with one mutation each; in four of five the digest was made right afterwards. Each
is loaded with `load_flow` and `load_pca` and used: encoded, decoded, sampled, and mixed if it is for images. An error
is clear if it is a `ValueError` or `OSError` that flowaug raises and that names the folder. A hang takes more than
{SECONDS} s. An allocation is a peak of more than six times the files and {SLACK // 2**20} MiB.

| mutated | {" | ".join(OUTCOMES)} |
|---|{"---|" * len(OUTCOMES)}
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("MUTATED_CHECKPOINTS.md"))
    args = parser.parse_args()
    start = time.perf_counter()
    results = run(args.count, args.seed)
    for result in results:
        if result.outcome not in OUTCOMES[:2]:
            print(*result, sep="\n    ", flush=True)
    args.output.write_text(report(results, args.seed, time.perf_counter() - start))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
