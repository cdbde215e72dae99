"""Experiments on cached features: the backbone's layers computed once, and WTFlow fitted and scored on them.

A point of an experiment is a dictionary of WTFlow's settings. A ``start_time`` of None is the control without a flow.
"""

import copy
import json
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from anomalib_wtflow import WTFlow
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.fit import fit_background, fit_model, fit_statistics
from anomalib_wtflow.images import hold_out
from anomalib_wtflow.settings import Settings, get_settings
from anomalib_wtflow.torch_model import WTFlowModel
from benchmarks.common import METRICS, track
from benchmarks.datasets import data_module, every_fourth_pixel, has_masks

LAYERS = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
"""At strides 4, 8, 16 and 32."""
MAP = (256, 256)
BATCH = 32
SCORE = ("density", "anomaly_map", "sigma", "top_fraction", "image_score", "background_slope")
"""What turns end points of the flow into a map and a score."""
INFERENCE = ("start_time", "steps", *SCORE)
"""What does not need another training."""
FEATURES = ("layers", "pool_size", "normalization", *SCORE)
"""What the control without a flow depends on."""
Point = dict[str, Any]


class Images(NamedTuple):
    """Backbone maps by layer, labels, and every fourth pixel of the masks, or None."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    labels: Tensor
    masks: Tensor | None


class Result(NamedTuple):
    """Scores and every fourth pixel of the maps of the test images; the field's parameters; seconds of training."""

    scores: Tensor
    pixels: Tensor
    parameters: int
    seconds: float


def start(**changes: Any) -> Point:
    """Return WTFlow's defaults as a point, with some changes.

    Raises:
        ValueError: If there is no such setting.
    """
    point = get_settings().plain()
    for name in changes:
        if name not in point:
            msg = f"There is no setting '{name}': choose from {', '.join(point)}."
            raise ValueError(msg)
    return {**point, **changes}


@torch.no_grad()
def load(name: str) -> Images:
    """Extract all layers of a data set, in float16; training images are the 80 % that WTFlow keeps."""
    module = data_module(name)
    extractor = FeatureExtractor(layers=LAYERS)
    transform = WTFlow.configure_pre_processor().transform
    held = hold_out([name] * len(module.train_data), Settings.calibration_ratio)

    def extract(data: Any, indices: Iterable[int], what: str) -> dict[str, Tensor]:
        images = (data[k].image[None] for k in track(list(indices), f"{name}, {what}"))
        rows = [[layer.half() for layer in extractor.network(transform(image))] for image in images]
        return dict(zip(LAYERS, map(torch.cat, zip(*rows, strict=True)), strict=True))

    train = extract(module.train_data, (~held).nonzero().flatten().tolist(), "training")
    test = extract(module.test_data, range(len(module.test_data)), "test")
    labels = torch.tensor(module.test_data.samples["label_index"].tolist()) > 0
    masks = torch.stack([every_fourth_pixel(item, MAP) for item in module.test_data]) if has_masks(module) else None
    return Images(train, test, labels, masks)


def untrained(point: Point) -> WTFlowModel:
    """Build a point's model."""
    return WTFlowModel(get_settings(**{name: value for name, value in point.items() if value is not None}))


@torch.no_grad()
def features(model: WTFlowModel, maps: dict[str, Tensor], point: Point) -> Tensor:
    """Stack the layers of a point as the model's extractor does."""
    chosen = [maps[name] for name in point["layers"] or LAYERS[:3]]
    parts = zip(*(layer.split(BATCH) for layer in chosen), strict=True)
    return torch.cat([model.feature_extractor.stack([layer.float() for layer in part]) for part in parts])


def identity(x0: Tensor, index: Tensor) -> Tensor:
    """No flow: the features stay where they are."""
    del index
    return x0


class Cache:
    """Backbone maps of the data sets, and the training that was the last."""

    def __init__(self) -> None:
        self.loaded: dict[str, Images] = {}
        self.last: tuple[Any, ...] = ("",)

    def images(self, data: str) -> Images:
        """Return a data set's maps."""
        if data not in self.loaded:
            self.loaded[data] = load(data)
        return self.loaded[data]

    def trained(self, data: str, point: Point) -> tuple[WTFlowModel, float]:
        """Train at a point, unless only the inference is another than the last time; with the seconds it took."""
        flow, images, model = point["start_time"] is not None, self.images(data), untrained(point)
        if not flow:
            model.flow = identity  # type: ignore[method-assign]
        index = torch.zeros(len(images.train[LAYERS[0]]), dtype=torch.int64)
        training = json.dumps([data, flow, {name: value for name, value in point.items() if name not in INFERENCE}])
        if self.last[0] != training:
            rows, begin = list(features(model, images.train, point)), time.perf_counter()
            if flow:
                fit_model(model, rows, index, MAP)
            else:
                fit_statistics(model, rows, index)
            seconds = time.perf_counter() - begin if flow else 0.0
            self.last = (training, copy.deepcopy(model.state_dict()), rows, seconds)
        _, state, rows, seconds = self.last
        # How the image score is taken belongs to the inference.
        fitted = {name: value for name, value in state.items() if not name.startswith("anomaly_map_generator")}
        model.load_state_dict(fitted, strict=False)
        fit_background(model, rows, index, MAP)
        return model, seconds

    def result(self, data: str, point: Point) -> Result:
        """Train at a point, and score the test images."""
        model, seconds = self.trained(data, point)
        x = features(model, self.images(data).test, point)
        with torch.no_grad():
            parts = [model.predict(part, MAP) for part in x.split(BATCH)]
        pixels = torch.cat([part.anomaly_map[:, 0, 2::4, 2::4] for part in parts])
        flow = point["start_time"] is not None
        parameters = sum(p.numel() for p in model.field.parameters()) if flow else 0
        return Result(torch.cat([part.pred_score for part in parts]), pixels, parameters, round(seconds, 1))


def measure(result: Result, images: Images) -> dict[str, float]:
    """All six metrics; without masks, the three of the images."""
    label, value = images.labels.numpy(), result.scores.numpy()
    values = [roc_auc_score(label, value), average_precision_score(label, value), best_f1(label, value)]
    if images.masks is not None:
        aupro = _AUPRO(fpr_limit=0.3)
        aupro.update(result.pixels, images.masks)
        mask, flat = images.masks.flatten().numpy(), result.pixels.flatten().numpy()
        values += [roc_auc_score(mask, flat), float(aupro.compute()), best_f1(mask, flat)]
    return {name: round(float(value), 5) for name, value in zip(METRICS, values, strict=False)}


def best_f1(label: np.ndarray, score: np.ndarray) -> float:
    """Largest F1 of all thresholds."""
    precision, recall, _ = precision_recall_curve(label, score)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())
