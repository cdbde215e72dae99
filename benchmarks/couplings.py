"""Transport cost and time of each coupling against batch size and positions, and its share of a training step.

    python -m benchmarks couplings
    python -m benchmarks couplings --quick                   sizes up to 16 x 16

Data: points uniform on the shell, C = 152 channels (strides 8 and 16 of the default backbone). The cost is
``E||x0 - eps||^2 / (2 C)`` at 16 x 16 positions, 1 for independent coupling. The training step is the default
network's, forward, backward and AdamW, on the same features. The default coupling may take 10 % of it.
"""

import statistics
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import normalize

from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.field import get_field
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import regress
from anomalib_wtflow.loss import WTFlowLoss
from benchmarks.base import Line
from benchmarks.candidates import Variant, interleaved
from benchmarks.common import Job, Promise, Verdict, table

CHANNELS = 152
DEFAULT, STEP = "worst", "training step"
COST_SIDE = 16
KEY = ("batch", "side")
OPTIONS = {"sides": (8, COST_SIDE, 32, 64)}
QUICK = {"sides": (8, COST_SIDE)}
SHARE = Promise(f"{DEFAULT}, largest share of a {STEP}", most=0.10)


def measure(batch: int, side: int) -> Line:
    """Measure the couplings and a training step, under independent coupling, at one size."""
    torch.manual_seed(0)
    x0 = CHANNELS**0.5 * normalize(torch.randn(batch, CHANNELS, side, side), dim=1)
    noise, field, loss = torch.randn_like(x0), get_field("pointwise", [CHANNELS]), WTFlowLoss()
    optimizer, path = torch.optim.AdamW(field.parameters()), ProbabilityPath("linear")

    def step() -> None:
        optimizer.zero_grad()
        loss(*regress(field, x0, path, COUPLINGS["independent"])).backward()
        optimizer.step()

    calls = {Variant(name): partial(coupling, x0, noise) for name, coupling in COUPLINGS.items()}
    seconds = interleaved({**calls, Variant(STEP): step}, 3)
    costs = {each.model: (x0 - call()).square().sum(1).mean().item() / (2 * CHANNELS) for each, call in calls.items()}
    taken = {each.model: statistics.median(times) for each, times in seconds.items()}
    return {"cost": costs, "seconds": taken, "torch": torch.__version__}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the sizes."""
    for batch in (8, 32):
        for side in given.sides:
            yield {"batch": batch, "side": side}, partial(measure, batch, side)


def render(lines: list[Line]) -> str:
    """Render the cost, milliseconds with the share of a training step, and what is promised."""
    columns, rows = {"coupling": "{name}"}, [{"name": name} for name in lines[0]["seconds"]]
    for line in lines:
        size = f"{line['batch']} x {line['side']}²"
        columns |= {f"cost, {size}": f"{{cost {size}:.3f}}"} if line["side"] == COST_SIDE else {}
        columns[f"ms, {size}"] = f"{{ms {size}:.1f}} ({{share {size}:.1%}})"
        for row in rows:
            taken, cost = line["seconds"][row["name"]], line["cost"].get(row["name"])
            row |= {f"ms {size}": 1e3 * taken, f"share {size}": taken / line["seconds"][STEP], f"cost {size}": cost}
    return "\n".join([*table(columns, rows), *(f"- {verdict}" for _, verdict in verdicts(lines))])


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say whether the default is cheap enough at all sizes."""
    return [SHARE.verdict(max(line["seconds"][DEFAULT] / line["seconds"][STEP] for line in lines))]
