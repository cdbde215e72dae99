"""Ablation of WTFlow on cached features: one factor at a time, on both real sets, with the no-flow control beside each.

    python -m benchmarks ablation                            all factors, each around WTFlow's defaults
    python -m benchmarks ablation --factors FACTOR ... [--seeds 0 1 2]
    python -m benchmarks ablation --quick                    bottles, the coupling, seed 0

The backbone's layers are computed once a run. WTFlow is trained on them, on the 80 % of the training images that it
keeps, and scored. Without a start time it is the no-flow control, which needs no training. Pixel metrics are taken on
every fourth pixel in each direction of the 256 x 256 map. The tables rank the settings of a factor.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.base import Line
from benchmarks.cached import FEATURES, LAYERS, Cache, Point, measure, start
from benchmarks.common import METRICS, Job, table
from benchmarks.datasets import REAL

SHOWN = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
KEY = ("factor", "base", "data", "setting")


def vary(name: str, *values: Any) -> list[dict[str, Any]]:
    """Vary one thing alone."""
    return [{name: value} for value in values]


FACTORS: dict[str, list[dict[str, Any]]] = {
    "layers": vary("layers", LAYERS[2:3], LAYERS[1:3], LAYERS[:3], LAYERS),
    "density": vary("density", "gaussian", "student"),
    "image score": [
        *vary("background_slope", None, 0.0, 0.75, 1.0),
        *vary("image_score", "map"),
        {"image_score": "map", "background_slope": 0.0},
        *vary("top_fraction", 0.01, 0.1),
    ],
    "importance": vary("importance", 0.0, 0.5, 1.0),
    "averaging": [{"averaging": 0.2}, {"averaging": 0.0, "scheduler": "cosine", "plateau": 0.0}],
    "map": [*vary("sigma", 0.0, 2.0, 4.0, 6.0, 8.0), *vary("anomaly_map", "relative")],
    "start": [*vary("start_time", 0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), *vary("steps", 2, 4)],
    "coupling": vary("coupling", "independent", "worst", "worst_of_two", "antipodal"),
    "path": vary("path", "linear", "gaussian", "variance_preserving"),
    "normalization": vary("normalization", "channel", "whitening", "layer_norm"),
    "network": [{"width": w, "depth": d} for w, d in ((64, 2), (128, 1), (128, 2), (256, 1), (256, 3), (512, 1))],
    "unet": [{"network": "pointwise"}, {"network": "unet", "width": 16}],
    "training": [
        *vary("max_epochs", 10, 20, 40, 80, 160),
        *vary("learning_rate", 1e-3),
        {"scheduler": "step", "plateau": 0.0},
    ],
    "pool": vary("pool_size", 1, 3, 5),
}
OPTIONS = {"factors": tuple(FACTORS), "data": REAL, "seeds": (0,)}
QUICK = {"factors": ["coupling"], "data": ["mvtec_bottle"]}


def varied(factor: str) -> list[str]:
    """Name what a factor varies; what was a factor once varied no start time."""
    return list(dict.fromkeys(name for change in FACTORS.get(factor, ()) for name in change))


def start_times(factor: str, base: Point) -> list[float | None]:
    """Return the start times that a factor's settings are scored from; None is the control, where it can differ."""
    names = varied(factor)
    control = any(name in FEATURES for name in names) and not {"start_time", "steps"} & set(names)
    return [None, base["start_time"]] if control else [base["start_time"]]


def of_factor(lines: list[Line], factor: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return the mean metrics over the seeds, by label and data set, of a factor's settings.

    They are those around the last base, at its start time unless the start time is what varies, and of them the
    settings that are there for all the factor's data sets. A label is what differs between them.
    """
    here = [line for line in lines if line["factor"] == factor]
    base = here[-1]["base"]
    here = [line for line in here if line["base"] == base and line["setting"]["start_time"] is not None]
    if "start_time" not in varied(factor):
        here = [line for line in here if line["setting"]["start_time"] == base["start_time"]]
    values = {name: {json.dumps(line["setting"][name]) for line in here} for name in base}
    names = [name for name, there in values.items() if len(there) > 1 and name != "seed"]
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for line in here:
        label = ", ".join(f"{name}={json.dumps(line['setting'][name])}" for name in names)
        runs.setdefault(label, {}).setdefault(line["data"], []).append(line["metrics"])
    sets = [name for name in REAL if any(name in row for row in runs.values())]
    return {
        label: {data: {m: float(np.mean([run[m] for run in row[data]])) for m in row[data][0]} for data in sets}
        for label, row in runs.items()
        if len(row) == len(sets)
    }


def mean_ranks(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Mean rank of each label over metrics and sets, best first; 1 is best."""
    first = next(iter(rows.values()))
    pairs = [(data, metric) for data, metrics in first.items() for metric in METRICS if metric in metrics]
    ranks = [rankdata([-round(row[data][metric], 5) for row in rows.values()]) for data, metric in pairs]
    means = dict(zip(rows, np.mean(ranks, axis=0).tolist(), strict=True))
    return dict(sorted(means.items(), key=lambda item: item[1]))


def render(lines: list[Line]) -> str:
    """Render a Markdown table a factor, best first; a setting is named by what differs within the factor."""
    text = []
    for factor in dict.fromkeys(line["factor"] for line in lines):
        here = of_factor(lines, factor)
        columns = {"setting": "{setting}", "mean rank": "{rank:.2f}"}
        for data in next(iter(here.values()), ()):
            columns |= {f"{data.split('_')[-1]} {m.replace('_', ' ')}": f"{{sets[{data}][{m}]:.4f}}" for m in SHOWN}
        ranks = mean_ranks(here) if here else {}
        rows = [{"setting": label, "rank": rank, "sets": here[label]} for label, rank in ranks.items()]
        text += [f"**{factor}**", "", *table(columns, rows)] if rows else []
    return "\n".join(text)


def measure_one(cache: Cache, data: str, point: Point) -> Line:
    """Measure one setting on one data set."""
    result = cache.result(data, point)
    metrics = measure(result, cache.images(data))
    return {"metrics": metrics, "parameters": result.parameters, "seconds": result.seconds}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the settings factor by factor."""
    base, cache = start(), Cache()
    for factor in given.factors:
        for data in given.data:
            for seed in given.seeds:
                for change in FACTORS[factor]:
                    for start_time in start_times(factor, base):
                        point = {**base, "start_time": start_time, **change, "seed": seed}
                        gives = {"factor": factor, "data": data, "setting": point, "base": base}
                        yield gives, partial(measure_one, cache, data, point)
