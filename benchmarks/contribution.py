"""What the flow adds to whitened features, and what each coupling adds to independent coupling, with 95 % intervals.

    python -m benchmarks contribution [--data mvtec_bottle magnetic_tile synthetic]
    python -m benchmarks contribution --quick                bottles, seed 0

Fields are trained as in the ablation with seeds 0, 1, 2. Each difference of image AUROC is the mean over the seeds. Its
95 % interval comes from drawing the test images anew 2000 times, normal and anomalous ones each among themselves, the
same draw for all seeds and both sides. Metrics of pixels have the spread of the seeds. One JSON line a data set.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks.base import Line
from benchmarks.cached import Cache, Point, Result, measure, start
from benchmarks.common import Job, averages, table, track
from benchmarks.datasets import REAL

COUPLINGS = ("independent", "worst_of_two", "worst")
NO_FLOW = "whitened, no flow"
SAME_FEATURES = "no flow"
"""The first control is the stronger: the Mahalanobis distance. The second has the flow's own normalisation."""
COLUMNS = {"": "{name}", "image AUROC": "{image_AUROC}", "pixel AUROC": "{pixel_AUROC}", "AUPRO": "{pixel_AUPRO}"}
KEY = ("data", "setting", "seeds")
OPTIONS = {"data": (*REAL, "synthetic"), "seeds": (0, 1, 2)}
QUICK = {"data": ["mvtec_bottle"], "seeds": [0]}
DRAWS = 2000


def image_auroc(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """AUROC of N scores under B weightings ``(B, N)`` of the images; ties count half."""
    positive, negative = score[label], score[~label]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    above, below = weight[:, label], weight[:, ~label]
    return ((above @ wins) * below).sum(1) / (above.sum(1) * below.sum(1))


def draws(label: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw how often each image is taken: all once, then ``DRAWS`` times with replacement within its class."""
    weight = np.zeros((DRAWS, len(label)))
    for side in (False, True):
        (index,) = np.nonzero(label == side)
        weight[:, index] = generator.multinomial(len(index), np.full(len(index), 1 / len(index)), size=DRAWS)
    return np.vstack([np.ones(len(label)), weight])


def contribution(cache: Cache, data: str, base: Point, seeds: Sequence[int]) -> Line:
    """Measure all variants on one data set, and the differences between them."""
    images = cache.images(data)
    label = images.labels.numpy()
    weight = draws(label, np.random.default_rng(0))
    control = {**base, "start_time": None}
    plan = [(NO_FLOW, {**control, "normalization": "whitening"}), (SAME_FEATURES, control)]
    plan += [(name, {**base, "coupling": name, "seed": seed}) for name in COUPLINGS for seed in seeds]
    measured: dict[str, list[Result]] = {}
    for name, point in track(plan, data):
        measured.setdefault(name, []).append(cache.result(data, point))
    aurocs = {
        name: np.mean([image_auroc(run.scores.numpy(), label, weight) for run in runs], axis=0)
        for name, runs in measured.items()
    }
    pairs = [(name, NO_FLOW) for name in COUPLINGS]
    pairs += [(name, "independent") for name in COUPLINGS if name != "independent"]
    return {
        "metrics": {name: [measure(run, images) for run in runs] for name, runs in measured.items()},
        "differences": [
            {"of": a, "to": b, "metric": "image_AUROC", **interval(aurocs[a] - aurocs[b])} for a, b in pairs
        ],
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Difference, and its 95 % interval over the draws."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"difference": round(float(values[0]), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def render(lines: list[Line]) -> str:
    """Render means and spreads, and the differences with their intervals."""
    text = []
    columns = {
        "difference": "{of} less {to}",
        "image AUROC": "{difference:+.4f} ({low:+.4f} to {high:+.4f})",
    }
    for line in lines:
        rows = [{"name": name, **averages(runs)} for name, runs in line["metrics"].items()]
        differences = [each for each in line["differences"] if each["metric"] == "image_AUROC"]
        text += [f"**{line['data']}**", "", *table(COLUMNS, rows), *table(columns, differences)]
    return "\n".join(text)


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the data sets."""
    base, cache = start(), Cache()
    for data in given.data:
        gives = {"data": data, "setting": base, "seeds": list(given.seeds)}
        yield gives, partial(contribution, cache, data, base, given.seeds)
