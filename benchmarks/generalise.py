"""Settings chosen without test labels: does a criterion on training images alone rank them as the test images do?

    python -m benchmarks generalise                    all factors on the four data sets, seed 0
    python -m benchmarks generalise --factors contrast --data screw
    python -m benchmarks generalise --quick            bottles, the contrast

A fifth of the good training images is held out, as for WTFlow's threshold; the field never sees them. Each gets
altered copies of eight kinds (benchmarks/pseudo.py), and the criteria are AUROCs, averaged over the kinds:

``still``      the altered copies against the held-out images as they are
``drifted``    the altered copies against the held-out images, all under another light and focus

Spearman's rho compares a criterion's ranking of a factor's settings with that of the test images, set by set. Beside
it: how often good images of the *other* data sets, foreign all over, score above the held-out images' 95 % quantile,
and the choice by leaving one set out: the setting with the best mean test AUROC on the other three. docs/ablation.md
has the rule, written before.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomalib_wtflow import WTFlow
from anomalib_wtflow.features.backbone import FeatureExtractor
from benchmarks.ablation import vary
from benchmarks.base import Line, read
from benchmarks.cached import LAYERS, Cache, Result, held_out, measure, score, start
from benchmarks.common import Job, table, track
from benchmarks.datasets import FOLDERS, data_module
from benchmarks.pseudo import KINDS, drift

SEED = 0
CRITERIA = ("still", "drifted")
FOREIGN, HELD = 16, 48
"""Good images of each other data set, and at most so many of the data set's own."""
KEY = ("factor", "data", "setting")
FACTORS: dict[str, list[dict[str, Any]]] = {
    "contrast": vary("contrast", None, 0.0, 0.5, 0.75, 1.0),
    "start_time": vary("start_time", 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
    "top_fraction": vary("top_fraction", 0.01, 0.03, 0.06, 0.1),
    "detail": vary("detail", 1, 2),
    "importance": vary("importance", 0.0, 0.5, 1.0),
    "averaging": [{"averaging": 0.2}, {"averaging": 0.0, "scheduler": "cosine"}],
    "max_epochs": vary("max_epochs", 20, 40, 80),
}
"""By the name of the first setting that varies; the first three need no training of their own."""
OPTIONS = {"factors": tuple(FACTORS), "data": tuple(FOLDERS), "base": {"detail": 2, "max_epochs": 80, "plateau": 0.0}}
QUICK = {"factors": ["contrast"], "data": ["mvtec_bottle"]}
Maps = dict[str, Tensor]


class Altered:
    """Backbone maps of a data set's held-out images, of their altered copies, and of foreign images; kept."""

    def __init__(self) -> None:
        self.extractor = FeatureExtractor(layers=LAYERS)
        self.resize, self.normalise = WTFlow.configure_pre_processor().transform.transforms
        self.kept: dict[str, dict[str, Maps]] = {}

    def images(self, data: str, count: int) -> list[np.ndarray]:
        """Return at most so many held-out images, spread evenly, ``(3, 256, 256)`` in [0, 1]."""
        module = data_module(data)
        held, _ = held_out(len(module.train_data))
        chosen = [held[k] for k in np.linspace(0, len(held) - 1, min(count, len(held))).astype(int)]
        return [self.resize(module.train_data[index].image[None])[0].numpy() for index in chosen]

    @torch.no_grad()
    def maps(self, images: list[np.ndarray]) -> Maps:
        """Extract all layers, in float16."""
        parts = [torch.from_numpy(np.stack(images[k : k + 16])).float() for k in range(0, len(images), 16)]
        rows = [[m.half() for m in self.extractor.network(self.normalise(part))] for part in parts]
        return dict(zip(LAYERS, map(torch.cat, zip(*rows, strict=True)), strict=True))

    def of(self, data: str) -> dict[str, Maps]:
        """Return the maps by name: ``good``, each kind, both also ``drifted``, and ``foreign``."""
        if data in self.kept:
            return self.kept[data]
        draw = np.random.default_rng(SEED)
        images = self.images(data, HELD)
        others = [image for name in FOLDERS if name != data for image in self.images(name, FOREIGN)]
        result = {
            "good": self.maps(images),
            "drifted good": self.maps([drift(image, draw) for image in images]),
            "foreign": self.maps(others),
        }
        for kind, alter in track(KINDS.items(), f"Altered copies of {data}"):
            altered = [alter(image, others[draw.integers(len(others))], draw) for image in images]
            result[kind] = self.maps(altered)
            result[f"drifted {kind}"] = self.maps([drift(image, draw) for image in altered])
        self.kept[data] = result
        return result


def auroc(good: Tensor, bad: Tensor) -> float:
    """AUROC of two samples of scores."""
    return float(roc_auc_score([0] * len(good) + [1] * len(bad), torch.cat([good, bad]).numpy()))


def measure_one(cache: Cache, altered: Altered, known: list[Line], gives: Line) -> Line:
    """Measure the criteria and the test metrics of one setting on one data set, or take over another factor's."""
    data, point = gives["data"], {**gives["base"], **gives["setting"]}
    for line in known:
        if line["data"] == data and {**line["base"], **line["setting"]} == point:
            return {**line, **gives}
    model, seconds = cache.trained(data, point)
    scores = {name: score(model, maps, point)[0] for name, maps in altered.of(data).items()}
    kinds = {
        name: {kind: round(auroc(scores[prefix + "good"], scores[prefix + kind]), 5) for kind in KINDS}
        for name, prefix in zip(CRITERIA, ("", "drifted "), strict=True)
    }
    limit = scores["good"].quantile(0.95)
    generator = model.anomaly_map_generator
    return {
        "criteria": {name: round(float(np.mean(list(values.values()))), 5) for name, values in kinds.items()},
        "kinds": kinds,
        "foreign": round(float((scores["foreign"] > limit).float().mean()), 5),
        "drifted_alarms": round(float((scores["drifted good"] > limit).float().mean()), 5),
        "metrics": measure(Result(*score(model, cache.images(data).test, point), 0, seconds), cache.images(data)),
        "slope": round(float(generator.slope), 4),
        "seconds": round(seconds, 1),
    }


def name_of(line: Line) -> str:
    """Name a setting."""
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in line["setting"].items())


def left_out(values: dict[str, dict[str, float]]) -> dict[str, str]:
    """Return the setting with the best mean on the other sets, by the set that is left out.

    Args:
        values: Test AUROC by setting and set.
    """
    sets = list(next(iter(values.values())))
    return {
        out: max(values, key=lambda name: np.mean([values[name][data] for data in sets if data != out] or [0.0]))
        for out in sets
    }


def agreement(lines: list[Line], criterion: str) -> float:
    """Spearman's rho of a criterion and the test images' AUROC over the settings of one factor on one set."""
    pairs = np.array([[line["criteria"][criterion], line["metrics"]["image_AUROC"]] for line in lines])
    if len(lines) < 2 or np.ptp(pairs, axis=0).min() == 0:
        return float("nan")
    return float(spearmanr(*pairs.T).statistic)


def render(lines: list[Line]) -> str:
    """Render for each factor its settings' test AUROC and criteria by set, and who would have chosen what."""
    text = []
    for factor in dict.fromkeys(line["factor"] for line in lines):
        here = [line for line in lines if line["factor"] == factor]
        sets = list(dict.fromkeys(line["data"] for line in here))
        cells: dict[str, dict[str, Line]] = {}
        for line in here:
            cells.setdefault(name_of(line), {})[line["data"]] = line
        cells = {name: row for name, row in cells.items() if set(row) == set(sets)}
        columns = {"setting": "{name}"}
        for data in sets:
            columns[data] = "{" + data + "}"
        columns |= {"mean": "{mean:.4f}", "foreign images found": "{foreign:.0%}"}
        rows = []
        for name, row in cells.items():
            shown = {
                data: f"{line['metrics']['image_AUROC']:.4f} ({line['criteria']['still']:.3f}, "
                f"{line['criteria']['drifted']:.3f})"
                for data, line in row.items()
            }
            values = [line["metrics"]["image_AUROC"] for line in row.values()]
            foreign = np.mean([line["foreign"] for line in row.values()])
            rows.append({"name": name, **shown, "mean": np.mean(values), "foreign": foreign})
        text += [f"**{factor}**: test image AUROC (still, drifted)", "", *table(columns, rows)]
        rows = []
        for criterion in CRITERIA:
            best = {data: max(cells, key=lambda name: cells[name][data]["criteria"][criterion]) for data in sets}
            rhos = {data: agreement([row[data] for row in cells.values()], criterion) for data in sets}
            rows.append({"name": criterion, **{data: f"{best[data]} (rho {rhos[data]:+.2f})" for data in sets}})
        values = {name: {d: line["metrics"]["image_AUROC"] for d, line in row.items()} for name, row in cells.items()}
        rows.append({"name": "left out", **left_out(values)})
        columns = {"chosen by": "{name}", **{data: "{" + data + "}" for data in sets}}
        text += table(columns, rows)
    return "\n".join(text)


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the data sets one after another, and of each the settings that share a training together."""
    base, cache, altered = start(**given.base), Cache(), Altered()
    for data in given.data:
        for factor in given.factors:
            for change in FACTORS[factor]:
                gives = {"factor": factor, "data": data, "setting": change, "base": base}
                known = [] if given.again else read(given.output)
                yield gives, partial(measure_one, cache, altered, known, gives)
        cache.loaded.pop(data, None)
        altered.kept.pop(data, None)
