"""What the flow adds to whitened features, and what each coupling adds to independent coupling, with 95 % intervals.

    python -m benchmarks contribution [--base JSON] [--data mvtec_bottle magnetic_tile synthetic]
    python -m benchmarks contribution --quick                bottles, seed 0

Fields are trained as in the ablation with seeds 0, 1, 2 and scored at the base's start time. Each difference is the
mean over the seeds; its 95 % interval comes from drawing the test images anew 2000 times, normal and anomalous ones
each among themselves, the same draw for all seeds and both sides. AUPRO has no interval of this kind: its spread is
that of the seeds. One JSON line a data set.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.base import Line
from benchmarks.cached import Cache, Point, measure, start
from benchmarks.common import Job, averages, table, track
from benchmarks.datasets import REAL

COUPLINGS = ("independent", "worst_of_two", "worst")
NO_FLOW = "whitened, no flow"
SAME_FEATURES = "no flow"
"""The first control is the stronger: the Mahalanobis distance. The second has the flow's own normalisation."""
COLUMNS = {"": "{name}", "image AUROC": "{image_AUROC}", "pixel AUROC": "{pixel_AUROC}", "AUPRO": "{pixel_AUPRO}"}
KEY = ("data", "setting", "seeds")
OPTIONS = {"data": (*REAL, "synthetic"), "seeds": (0, 1, 2), "base": {}}
QUICK = {"data": ["mvtec_bottle"], "seeds": [0]}
BINS = 1024
DRAWS = 2000


class Measured(NamedTuple):
    """What one setting gives: metrics, image scores, and each image's counts of pixels, if there are masks."""

    metrics: dict[str, float]
    scores: np.ndarray
    counts: np.ndarray | None


def image_auroc(score: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """AUROC of N scores under B weightings ``(B, N)`` of the images; ties count half."""
    positive, negative = score[label], score[~label]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    above, below = weight[:, label], weight[:, ~label]
    return ((above @ wins) * below).sum(1) / (above.sum(1) * below.sum(1))


def pixel_auroc(histograms: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """AUROC of pixels in ordered bins, from each image's counts ``(N, 2, BINS)`` of normal and anomalous pixels."""
    below, above = weight @ histograms[:, 0], weight @ histograms[:, 1]
    before = below.cumsum(1) - below
    return (above * (before + below / 2)).sum(1) / (above.sum(1) * below.sum(1))


def histograms(pixels: Tensor, masks: Tensor) -> np.ndarray:
    """Count each image's normal and anomalous pixels in bins that hold equally many pixels overall."""
    edges = np.quantile(pixels.numpy(), np.linspace(0, 1, BINS + 1)[1:-1])
    images = zip(np.digitize(pixels.flatten(1).numpy(), edges), masks.flatten(1).numpy(), strict=True)
    counts = [[np.bincount(bins[mask == side], minlength=BINS) for side in (False, True)] for bins, mask in images]
    return np.stack(counts).astype(float)


def draws(label: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw how often each image is taken: all once, then ``DRAWS`` times with replacement within its class."""
    weight = np.zeros((DRAWS, len(label)))
    for side in (False, True):
        (index,) = np.nonzero(label == side)
        weight[:, index] = generator.multinomial(len(index), np.full(len(index), 1 / len(index)), size=DRAWS)
    return np.vstack([np.ones(len(label)), weight])


def variant(cache: Cache, data: str, point: Point) -> Measured:
    """Measure one setting."""
    result, images = cache.result(data, point), cache.images(data)
    counts = None if images.masks is None else histograms(result.pixels, images.masks)
    return Measured(measure(result, images), result.scores.numpy(), counts)


def aurocs(runs: list[Measured], label: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Return the AUROCs, averaged over the seeds, for each draw of the images."""
    result = {"image_AUROC": np.mean([image_auroc(run.scores, label, weight) for run in runs], axis=0)}
    counts = [run.counts for run in runs if run.counts is not None]
    if counts:
        result["pixel_AUROC"] = np.mean([pixel_auroc(each, weight) for each in counts], axis=0)
    return result


def contribution(cache: Cache, data: str, base: Point, seeds: Sequence[int]) -> Line:
    """Measure all variants on one data set, and the differences between them."""
    label = cache.images(data).labels.numpy()
    weight = draws(label, np.random.default_rng(0))
    control = {**base, "start_time": None}
    flows = list(dict.fromkeys([*COUPLINGS, base["coupling"]]))
    plan = [(NO_FLOW, {**control, "normalization": "whitening"}), (SAME_FEATURES, control)]
    plan += [(name, {**base, "coupling": name, "seed": seed}) for name in flows for seed in seeds]
    measured: dict[str, list[Measured]] = {}
    for name, point in track(plan, data):
        measured.setdefault(name, []).append(variant(cache, data, point))
    values = {name: aurocs(runs, label, weight) for name, runs in measured.items()}
    pairs = [(name, NO_FLOW) for name in flows]
    pairs += [(name, "independent") for name in flows if name != "independent"]
    return {
        "metrics": {name: [run.metrics for run in runs] for name, runs in measured.items()},
        "differences": [
            {"of": a, "to": b, "metric": metric, **interval(values[a][metric] - values[b][metric])}
            for a, b in pairs
            for metric in values[a]
        ],
    }


def interval(values: np.ndarray) -> dict[str, float]:
    """Difference, and its 95 % interval over the draws."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"difference": round(float(values[0]), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def render(lines: list[Line]) -> str:
    """Render means and spreads, and the differences with their intervals."""
    text = []
    columns = {"difference": "{name}", **{title: COLUMNS[title] for title in ("image AUROC", "pixel AUROC")}}
    for line in lines:
        rows = [{"name": name, **averages(runs)} for name, runs in line["metrics"].items()]
        differences: dict[str, dict[str, str]] = {}
        for d in line["differences"]:
            name = f"{d['of']} less {d['to']}"
            value = f"{d['difference']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})"
            differences.setdefault(name, {"name": name})[d["metric"]] = value
        text += [f"**{line['data']}**", "", *table(COLUMNS, rows), *table(columns, differences.values())]
    return "\n".join(text)


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the data sets."""
    base, cache = start(**given.base), Cache()
    for data in given.data:
        gives = {"data": data, "setting": base, "seeds": list(given.seeds)}
        yield gives, partial(contribution, cache, data, base, given.seeds)
