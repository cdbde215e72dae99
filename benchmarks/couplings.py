"""Transport cost and time of each coupling against batch size and positions, and its share of a training step.

    python -m benchmarks couplings
    python -m benchmarks couplings --quick                   sizes up to 16 x 16

Data: points uniform on the shell, C = 152 channels (strides 8 and 16 of the default backbone). The cost is
``E||x0 - eps||^2 / (2 C)`` at 16 x 16 positions, 1 for independent coupling. The training step is the default
network's, forward, backward and AdamW, on the same features. The default coupling may take 10 % of it.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import normalize

from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.field import get_field
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import regress
from anomalib_wtflow.loss import WTFlowLoss
from benchmarks.base import Line
from benchmarks.common import Benchmark, Job, Promise, Verdict, machine, table

CHANNELS = 152
DEFAULT = "worst"
COST_SIDE = 16
SHARE = Promise(f"{DEFAULT}, largest share of a training step", most=0.10)


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Median of the repeats, after a call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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

    coupled = {name: coupling(x0, noise) for name, coupling in COUPLINGS.items()}
    return {
        "batch": batch,
        "side": side,
        "training_step": seconds(step),
        "seconds": {name: seconds(partial(coupling, x0, noise)) for name, coupling in COUPLINGS.items()},
        "cost": {name: float((x0 - eps).square().sum(1).mean() / (2 * CHANNELS)) for name, eps in coupled.items()},
        "machine": {**machine(), "torch": torch.__version__},
    }


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the sizes."""
    for batch in (8, 32):
        for side in given.sides:
            yield {"batch": batch, "side": side}, partial(measure, batch, side)


def render(lines: list[Line], given: Namespace) -> str:
    """Render the cost, milliseconds with the share of a training step, and what is promised."""
    names, costs = list(lines[0]["cost"]), [line for line in lines if line["side"] == COST_SIDE]
    columns = {f"cost, batch {line['batch']}": f"{{cost[{k}]:.3f}}" for k, line in enumerate(costs)}
    rows: list[Line] = [{"name": name, "cost": [line["cost"][name] for line in costs]} for name in names]
    text = table({"coupling": "{name}", **columns}, rows)
    columns = {f"{line['batch']} x {line['side']}²": f"{{times[{k}]}}" for k, line in enumerate(lines)}
    rows = []
    for name in names:
        pairs = [(line["seconds"][name], line["training_step"]) for line in lines]
        rows.append({"name": name, "times": [f"{1e3 * own:.1f} ({own / step:.1%})" for own, step in pairs]})
    rows.append({"name": "training step", "times": [f"{1e3 * line['training_step']:.0f}" for line in lines]})
    text += table({"ms (share of a step)": "{name}", **columns}, rows)
    return "\n".join([*text, *(f"- {verdict}" for _, verdict in verdicts(lines, given))])


def verdicts(lines: list[Line], given: Namespace) -> list[Verdict]:
    """Say whether the default is cheap enough at all sizes."""
    del given
    return [SHARE.verdict(max(line["seconds"][DEFAULT] / line["training_step"] for line in lines))]


BENCHMARK = Benchmark(
    render,
    jobs,
    key=("batch", "side"),
    verdicts=verdicts,
    arguments=lambda parser: parser.add_argument("--sides", nargs="+", type=int, default=(8, COST_SIDE, 32, 64)),
    quick={"sides": (8, COST_SIDE)},
)
