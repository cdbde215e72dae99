"""The threshold for 5 % false alarms: a held-out fifth (split) against folds that let every image train (cross).

    python -m benchmarks threshold                     the four data sets, seed 0
    python -m benchmarks threshold --quick             bottles

``split``: the field is trained on four fifths of the good training images, and the threshold is the conformal quantile
of the other fifth; a good part is rejected with a probability of at most the rate. ``cross``: the field is trained on
all of them, and the threshold is the same quantile of scores that each fold gets from a field that was trained without
it (cross-conformal prediction, Vovk 2015; CV+, Barber et al. 2021: at most twice the rate, and a little, in theory).
``false alarms`` are the good test images above the threshold; where they come from another batch or module than the
training images, no way of calibrating on those can keep the rate. ``best F1 at the rate`` is that of the best
threshold with at most the rate among good test images: what a threshold that knows them could reach.
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from sklearn.metrics import f1_score, roc_auc_score, roc_curve
from torch import Tensor

from anomalib_wtflow.post_processor import conformal_threshold
from anomalib_wtflow.torch_model import WTFlowModel
from benchmarks.base import Line
from benchmarks.cached import (
    BATCH,
    MAP,
    Images,
    Point,
    best_f1,
    features,
    load,
    normalise,
    reference_of,
    start,
    train,
    untrained,
)
from benchmarks.common import Job, table
from benchmarks.datasets import FOLDERS

FOLDS = 4
WAYS = ("split", "cross")
KEY = ("data", "setting")
OPTIONS = {"data": tuple(FOLDERS), "base": {}}
QUICK = {"data": ["mvtec_bottle"]}
COLUMNS = {
    "": "{way}",
    "training images": "{images}",
    "image AUROC": "{auroc:.4f}",
    "false alarms": "{false_alarms:.3f}",
    "F1 at the threshold": "{f1:.3f}",
    "best F1 at the rate": "{best_at_rate:.3f}",
    "best F1": "{best:.3f}",
    "seconds": "{seconds:.0f}",
}


@torch.no_grad()
def scores(model: WTFlowModel, x: Tensor) -> Tensor:
    """Score backbone features."""
    return torch.cat([model.predict(part, MAP).pred_score for part in x.split(BATCH)])


def fitted(x: Tensor, point: Point) -> WTFlowModel:
    """Train a model on backbone features."""
    model = untrained(point)
    x0 = normalise(model, x, point)
    train(model, x0, point)
    model.eval()
    model.observe(reference_of(x0), MAP)
    return model


def best_at_rate(label: np.ndarray, score: np.ndarray, rate: float) -> float:
    """Largest F1 among thresholds that at most a share of the good images exceed."""
    false, true, _ = roc_curve(label, score, drop_intermediate=False)
    good, bad = (~label).sum(), label.sum()
    f1 = 2 * true * bad / np.maximum(true * bad + false * good + bad, 1)
    return float(f1[false <= rate].max())


def measure_ways(images: Images, point: Point) -> list[Line]:
    """Measure both ways on one data set."""
    whole = untrained(point)
    held, kept, test = (features(whole, maps, point) for maps in (images.held, images.train, images.test))
    label, rate = images.labels.numpy(), point["false_alarm_rate"]
    lines = []
    for way in WAYS:
        begin = time.perf_counter()
        if way == "split":
            model = fitted(kept, point)
            good = scores(model, held)
        else:
            x = torch.cat([kept, held])
            fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(point["seed"])) % FOLDS
            model = fitted(x, point)
            good = torch.cat([scores(fitted(x[fold != k], point), x[fold == k]) for k in range(FOLDS)])
        seconds = time.perf_counter() - begin
        score = scores(model, test).numpy()
        alarm = score > float(conformal_threshold(good, rate).threshold)
        lines.append(
            {
                "way": way,
                "images": len(kept) + (len(held) if way == "cross" else 0),
                "auroc": round(float(roc_auc_score(label, score)), 5),
                "false_alarms": round(float(alarm[~label].mean()), 5),
                "f1": round(float(f1_score(label, alarm)), 5),
                "best_at_rate": round(best_at_rate(label, score, rate), 5),
                "best": round(best_f1(label, score), 5),
                "seconds": round(seconds, 1),
            }
        )
    return lines


def measure_one(data: str, point: Point) -> Line:
    """Measure one data set."""
    return {"ways": measure_ways(load(data), point)}


def render(lines: list[Line]) -> str:
    """Render a table for each data set."""
    text = []
    for line in lines:
        text += [f"**{line['data']}**", "", *table(COLUMNS, line["ways"])]
    return "\n".join(text)


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the data sets."""
    point = start(**given.base)
    for data in given.data:
        yield {"data": data, "setting": point}, partial(measure_one, data, point)
