"""Transport cost and time of each coupling against batch size and positions, and its share of a training step.

Usage: python benchmarks/couplings.py [--quick] [--output benchmarks/results/couplings.json]

Data: points uniform on the shell, C = 152 channels (strides 8 and 16 of the default backbone). The cost is
``E||x0 - eps||^2 / (2 C)``, 1 for independent coupling. The training step is the default network's, forward, backward
and AdamW, on the same features. Prints Markdown tables; exits with 1 if the default coupling takes more than 10 % of
a training step.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize

from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import regress
from anomalib_wtflow.flow.times import uniform
from anomalib_wtflow.loss import WTFlowLoss

CHANNELS = 152
DEFAULT = "worst"
LONGEST_CALL = 60.0
"""Seconds; a size is left out if the last size's time, grown with the cube of the assignment, predicts more."""


def features(batch: int, side: int) -> torch.Tensor:
    """Points on the shell, ``(batch, C, side, side)``."""
    return CHANNELS**0.5 * normalize(torch.randn(batch, CHANNELS, side, side), dim=1)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Median of the repeats, after a call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def training_step(batch: int, side: int) -> float:
    """Seconds of one training step of the default network under independent coupling."""
    x0, field = features(batch, side), PointwiseField(CHANNELS)
    optimizer = torch.optim.AdamW(field.parameters())
    path, loss = ProbabilityPath("linear"), WTFlowLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(*regress(field, x0, path, COUPLINGS["independent"], uniform)).backward()
        optimizer.step()

    return seconds(step)


def costs(batch: int, side: int) -> dict[str, float]:
    """Relative transport cost of each coupling."""
    x0 = features(batch, side)
    noise = torch.randn_like(x0)
    return {
        name: float((x0 - coupling(x0, noise)).square().sum(1).mean() / (2 * CHANNELS))
        for name, coupling in COUPLINGS.items()
    }


def main() -> None:
    """Measure, write the JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Sizes up to 16 x 16 only.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "couplings.json")
    given = parser.parse_args()
    torch.manual_seed(0)
    sides = (8, 16) if given.quick else (8, 16, 32, 64)
    sizes = [(batch, side) for batch in (8, 32) for side in sides]

    rows = []
    predicted: dict[tuple[str, int], float] = {}
    for batch, side in sizes:
        x0 = features(batch, side)
        noise = torch.randn_like(x0)
        row: dict[str, object] = {"batch": batch, "side": side, "training_step": training_step(batch, side)}
        for name, coupling in COUPLINGS.items():
            if predicted.get((name, batch), 0) > LONGEST_CALL:
                row[name] = None
                continue
            taken = seconds(lambda c=coupling, x=x0, n=noise: c(x, n), 1 if predicted.get((name, batch), 0) > 1 else 3)
            row[name] = taken
            predicted[name, batch] = taken * (64 if name.endswith("_image") else 4)
        rows.append(row)
        print(f"batch {batch}, {side} x {side}: done", file=sys.stderr, flush=True)
    result = {
        "machine": {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "channels": CHANNELS,
        "cost": {f"{batch}": costs(batch, 16) for batch in (8, 32)},
        "seconds": rows,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
    share = max(row[DEFAULT] / row["training_step"] for row in rows)  # type: ignore[operator]
    print(f"{DEFAULT} takes at most {share:.1%} of a training step")
    sys.exit(share > 0.10)


def cpu() -> str:
    """Name the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def tables(result: dict) -> str:
    """Render the tables in Markdown: cost at 16 x 16, and milliseconds with the share of a training step."""
    lines = ["| coupling | cost, batch 8 | cost, batch 32 |", "|---|---|---|"]
    lines += [f"| {name} | {result['cost']['8'][name]:.3f} | {result['cost']['32'][name]:.3f} |" for name in COUPLINGS]
    rows = result["seconds"]
    lines += ["", "| ms (share of a step) | " + " | ".join(f"{r['batch']} x {r['side']}²" for r in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in COUPLINGS:
        cells = [
            "not run" if r[name] is None else f"{1e3 * r[name]:.1f} ({r[name] / r['training_step']:.1%})" for r in rows
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| training step | " + " | ".join(f"{1e3 * r['training_step']:.0f}" for r in rows) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
