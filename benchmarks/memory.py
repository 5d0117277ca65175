"""Memory and time of a training step of a flow with and without gradient checkpointing.

    python benchmarks/memory.py            # about two minutes on two cores; writes memory.md

Each form runs in its own process. Its peak memory is the maximum resident set size during the step minus the resident
set size before it (Python, torch, weights). There, the C library returns freed memory to the system immediately, which
takes time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from flowaug import create_flow
from flowaug.training.runtime import machine_name

FORMS = {"saved": (None, False), "recomputed": (None, True), "recomputed, bfloat16": (torch.bfloat16, True)}
RETURNS = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # return freed tensors immediately, so that only live ones are counted


def resident(field: str) -> float:
    """Return a field of ``/proc/self/status`` in GiB: VmRSS is the current size, VmHWM the maximum since ``reset``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def reset() -> None:
    """Reset VmHWM to the current size (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def one_form(form: str, batch: int, repeats: int) -> dict:
    """Measure one form.

    Returns:
        Peak memory in GiB, minimum seconds per step without the first one, and the norm of the gradient.
    """
    flow = create_flow("mef_base", event_shape=(3, 32, 32), num_classes=10)
    x = torch.rand(batch, *flow.event_shape, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(batch, dtype=torch.long)
    flow.initialise(x[:8])
    flow.set_training_form(*FORMS[form])

    before, times = resident("VmRSS"), []
    reset()
    for _ in range(1 + repeats):
        began = time.perf_counter()
        flow.zero_grad()
        (-flow.log_prob(x, y).mean()).backward()
        times.append(time.perf_counter() - began)
    peak = resident("VmHWM") - before
    norm = torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]).double().norm()
    return {"peak": peak, "seconds": min(times[1:]), "norm": norm.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    if args.form:
        print(json.dumps(one_form(args.form, args.batch, args.repeats)))
        return
    rows, first = [], None
    for form in FORMS:
        command = [sys.executable, __file__, "--form", form, "--batch", str(args.batch), "--repeats", str(args.repeats)]
        values = json.loads(subprocess.run(command, check=True, capture_output=True, env=os.environ | RETURNS).stdout)
        first = first or values
        memory, slower = values["peak"] / first["peak"], values["seconds"] / first["seconds"]
        rows.append(f"| {form} | {values['peak']:.2f} | {memory:.2f} | {values['seconds']:.1f} | {slower:.2f} | ")
        rows[-1] += f"{abs(values['norm'] / first['norm'] - 1):.0e} |"
        print(rows[-1], flush=True)
    args.output.write_text(f"""# Memory of a training step

`python benchmarks/memory.py`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()} threads,
torch {torch.__version__}. `mef_base` at 32×32×3, batch {args.batch}, forward and backward pass. Peak memory of the
process above its memory before the step, including the gradients (0.16 GiB).

| activations | peak, GiB | relative to saved | seconds | relative to saved | relative error of the gradient norm |
|---|---|---|---|---|---|
{chr(10).join(rows)}
""")


if __name__ == "__main__":
    main()
