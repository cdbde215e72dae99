"""Ablation of WTFlow on cached features: one factor at a time, on both real sets, with the no-flow control beside each.

    python -m benchmarks ablation                            all factors, each around WTFlow's defaults
    python -m benchmarks ablation --factors FACTOR ... [--base JSON] [--seeds 0 1 2]
    python -m benchmarks ablation --render                   each factor's mean ranks
    python -m benchmarks ablation --quick                    bottles, the coupling, seed 0

The backbone's layers are computed once a run; WTFlow is trained on them, on the 80 % of the training images that it
keeps, and scored from the start time; without one it is the no-flow control, which needs no training. A factor is
ranked at the base's start time. Pixel metrics are taken on every fourth pixel in each direction of the 256 x 256 map.
One JSON line a setting. docs/ablation.md has the selection rule.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.base import Line, identity, read
from benchmarks.cached import FEATURES, LAYERS, Cache, Point, measure, start
from benchmarks.common import CONSOLE, METRICS, Job, table
from benchmarks.datasets import REAL

SHOWN = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
MEASURED = ("data", "setting")
KEY = ("factor", "base", *MEASURED)
TIE = 0.25
MOST_PARAMETERS, MOST_SECONDS = 5_000_000, 300


def vary(name: str, *values: Any) -> list[dict[str, Any]]:
    """Vary one thing alone."""
    return [{name: value} for value in values]


FACTORS: dict[str, list[dict[str, Any]]] = {
    "layers": vary("layers", LAYERS[2:3], LAYERS[1:3], LAYERS[:3], LAYERS),
    "density": vary("density", "gaussian", "student"),
    "image score": [
        *vary("contrast", None, 0.0, 0.75, 1.0),
        *vary("limit", False),
        *vary("image_score", "map"),
        {"image_score": "map", "contrast": 0.0},
        *vary("top_fraction", 0.01, 0.1),
    ],
    "detail": vary("detail", 1, 2),
    "importance": vary("importance", 0.0, 0.5, 1.0),
    "averaging": [{"averaging": 0.2}, {"averaging": 0.0, "scheduler": "cosine", "plateau": 0.0}],
    "map": [*vary("sigma", 0.0, 2.0, 4.0, 6.0, 8.0), *vary("anomaly_map", "relative")],
    "start": [*vary("start_time", 0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), *vary("steps", 2, 4)],
    "coupling": vary("coupling", "independent", "worst", "worst_of_two", "antipodal"),
    "path": vary("path", "linear", "gaussian", "variance_preserving"),
    "normalization": [
        *vary("normalization", "channel", "whitening", "layer_norm"),
        {"normalization": "whitening", "ridge": 0.3},
    ],
    "network": [{"width": w, "depth": d} for w, d in ((64, 2), (128, 1), (128, 2), (256, 1), (256, 3), (512, 1))],
    "unet": [{"network": "pointwise"}, {"network": "unet", "width": 16}],
    "training": [
        *vary("max_epochs", 10, 20, 40, 80, 160),
        *vary("learning_rate", 1e-3),
        {"scheduler": "step", "plateau": 0.0},
    ],
    "pool": vary("pool_size", 1, 3, 5),
}
OPTIONS = {"factors": tuple(FACTORS), "data": REAL, "seeds": (0,), "base": {}}
QUICK = {"factors": ["coupling"], "data": ["mvtec_bottle"]}


def varied(factor: str) -> list[str]:
    """Name what a factor varies; what was a factor once varied no start time."""
    return list(dict.fromkeys(name for change in FACTORS.get(factor, ()) for name in change))


def start_times(factor: str, base: Point) -> list[float | None]:
    """Return the start times that a factor's settings are scored from; None is the control, where it can differ."""
    names = varied(factor)
    control = any(name in FEATURES for name in names) and not {"start_time", "steps"} & set(names)
    return [None, base["start_time"]] if control else [base["start_time"]]


def sets_of(lines: list[Line]) -> list[str]:
    """Return the data sets of some lines, in the order of the docs."""
    return sorted(dict.fromkeys(line["data"] for line in lines), key=lambda name: (*REAL, name).index(name))


def label(setting: Point, names: list[str]) -> str:
    """Name a setting by what differs."""
    return ", ".join(f"{name}={json.dumps(setting[name])}" for name in names)


def of_factor(lines: list[Line], factor: str, base: Point | None = None) -> list[Line]:
    """Return a factor's lines that are ranked, with their labels.

    Those around a base, or the last one, and at its start time, unless the start time is what varies; and of them the
    settings that are there for all the factor's data sets.
    """
    here = [line for line in lines if line["factor"] == factor]
    base = base or here[-1]["base"]
    times = {line["setting"]["start_time"] for line in here} if "start_time" in varied(factor) else {base["start_time"]}
    here = [line for line in here if line["base"] == base and line["setting"]["start_time"] in times - {None}]
    tell = [json.dumps({**line["setting"], "seed": None}, sort_keys=True) for line in here]
    sets: dict[str, set[str]] = {}
    for line, name in zip(here, tell, strict=True):
        sets.setdefault(name, set()).add(line["data"])
    whole = set(sets_of(here))
    here = [line for line, name in zip(here, tell, strict=True) if sets[name] == whole]
    values = {name: {json.dumps(line["setting"][name]) for line in here} for name in base}
    names = [name for name, there in values.items() if len(there) > 1 and name != "seed"]
    return [{**line, "label": label(line["setting"], names)} for line in here]


def means(lines: list[Line], name: str, data: str) -> dict[str, float]:
    """Average a label's metrics on a data set over the seeds."""
    ours = [line["metrics"] for line in lines if line["label"] == name and line["data"] == data]
    return {metric: float(np.mean([values[metric] for values in ours])) for metric in ours[0]}


def mean_ranks(lines: list[Line]) -> dict[str, float]:
    """Mean rank of each label over metrics and sets, after averaging over seeds; 1 is best."""
    labels = list(dict.fromkeys(line["label"] for line in lines))
    ranks = []
    for data in sets_of(lines):
        rows = [means(lines, name, data) for name in labels]
        ranks += [rankdata(-np.round([row[metric] for row in rows], 5)) for metric in METRICS if metric in rows[0]]
    return dict(zip(labels, np.mean(ranks, axis=0).tolist(), strict=True)) if labels else {}


def render(lines: list[Line]) -> str:
    """Render a Markdown table a factor, best first; a setting is named by what differs within the factor."""
    text = []
    for factor in dict.fromkeys(line["factor"] for line in lines):
        here = of_factor(lines, factor)
        sets = sets_of(here)
        columns = {"setting": "{setting}", "mean rank": "{rank:.2f}"}
        for place, data in enumerate(sets):
            columns |= {f"{data.split('_')[-1]} {m.replace('_', ' ')}": f"{{sets[{place}][{m}]:.4f}}" for m in SHOWN}
        rows = [
            {"setting": name, "rank": rank, "sets": [means(here, name, data) for data in sets]}
            for name, rank in sorted(mean_ranks(here).items(), key=lambda item: item[1])
        ]
        text += [f"**{factor}**", "", *table(columns, rows)] if rows else []
    return "\n".join(text)


def winner(lines: list[Line], base: Point) -> Point:
    """Apply docs/ablation.md's rule to the lines of one factor."""
    ranks = mean_ranks(lines)
    allowed = {}
    for line in lines:
        if line["parameters"] <= MOST_PARAMETERS and line["seconds"] <= MOST_SECONDS:
            allowed[line["label"]] = line
        else:
            ranks.pop(line["label"], None)
    best = min(ranks.values())

    def order(name: str) -> tuple[float, ...]:
        setting, parameters = allowed[name]["setting"], allowed[name]["parameters"]
        changes = sum(setting[k] != v for k, v in base.items())
        flow = parameters * setting["steps"] * setting["max_epochs"]
        return parameters, flow, setting["sigma"], changes

    return allowed[min((name for name, rank in ranks.items() if rank < best + TIE), key=order)]["setting"]


def measure_one(cache: Cache, known: list[Line], gives: Line) -> Line:
    """Measure one setting on one data set, or take over what another factor has measured."""
    for line in known:
        if identity(line, MEASURED) == identity(gives, MEASURED):
            return {**line, **gives}
    point, base = gives["setting"], gives["base"]
    CONSOLE.print(f"  {label(point, [name for name in base if point[name] != base[name]]) or 'the base'}")
    result = cache.result(gives["data"], point)
    metrics = measure(result, cache.images(gives["data"]))
    return {"metrics": metrics, "parameters": result.parameters, "seconds": result.seconds}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the settings factor by factor, and say which one the rule takes."""
    base, cache = start(**given.base), Cache()
    for factor in given.factors:
        for data in given.data:
            for seed in given.seeds:
                for change in FACTORS[factor]:
                    for start_time in start_times(factor, base):
                        point = {**base, "start_time": start_time, **change, "seed": seed}
                        known = [] if given.again else read(given.output)
                        gives = {"factor": factor, "data": data, "setting": point, "base": base}
                        yield gives, partial(measure_one, cache, known, gives)
        chosen = winner(of_factor(read(given.output), factor, base), base)
        CONSOLE.print(f"{factor}: the rule takes {label(chosen, varied(factor))}")
