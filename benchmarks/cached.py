"""Experiments on cached features: the backbone's layers computed once, and WTFlow trained and scored on them.

A point of an experiment is a dictionary: WTFlow's settings, and what :data:`EXTRAS` adds to them.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

from anomalib_wtflow import WTFlow
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.loss import WTFlowLoss
from anomalib_wtflow.settings import get_settings
from anomalib_wtflow.torch_model import WTFlowModel
from anomalib_wtflow.training.calibration import SLICE_SEED
from anomalib_wtflow.training.feature_caching import REFERENCE_IMAGES
from anomalib_wtflow.training.plateau import has_settled, matching_loss_of
from benchmarks.common import METRICS, track
from benchmarks.datasets import data_module, every_fourth_pixel, has_masks

LAYERS = ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]
"""At strides 4, 8, 16 and 32."""
MAP = (256, 256)
BATCH = 32
EXTRAS = {"ridge": 0.01, "limit": True}
"""Ridge of the normalisation, and whether the contrast has its limit."""
SCORE = ("density", "anomaly_map", "sigma", "top_fraction", "image_score", "contrast", "limit")
"""What turns end points of the flow into a map and a score."""
INFERENCE = ("start_time", "steps", *SCORE)
"""What does not need another training."""
FEATURES = ("layers", "detail", "pool_size", "normalization", "ridge", *SCORE)
"""What the control without a flow, whose start time is None, depends on."""
Point = dict[str, Any]


class Images(NamedTuple):
    """Backbone maps by layer, labels, every fourth pixel of the masks, or None; and the images held out."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]
    labels: Tensor
    masks: Tensor | None
    held: dict[str, Tensor] = {}  # noqa: RUF012


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
    point = {**json.loads(json.dumps(asdict(get_settings()))), **EXTRAS}
    for name in changes:
        if name not in point:
            msg = f"There is no setting '{name}': choose from {', '.join(point)}."
            raise ValueError(msg)
    return {**point, **changes}


def held_out(count: int) -> tuple[list[int], list[int]]:
    """Return which of the training images WTFlow holds out for its threshold, a fifth, and which it keeps."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SLICE_SEED)).tolist()
    held = max(1, round(get_settings().calibration_ratio * count))
    return sorted(order[:held]), sorted(order[held:])


@torch.no_grad()
def load(name: str) -> Images:
    """Extract all layers of a data set, in float16; training images are the 80 % that WTFlow keeps."""
    module = data_module(name)
    extractor = FeatureExtractor(layers=LAYERS)
    transform = WTFlow.configure_pre_processor().transform
    held, kept = held_out(len(module.train_data))
    labels, masks = [], []

    def extract(items: Iterable[Any]) -> dict[str, Tensor]:
        rows = [[m.half() for m in extractor.network(transform(item.image[None]))] for item in items]
        return dict(zip(LAYERS, map(torch.cat, zip(*rows, strict=True)), strict=True))

    def tested() -> Iterator[Any]:
        for index in track(range(len(module.test_data)), f"{name}, test"):
            item = module.test_data[index]
            labels.append(bool(item.gt_label))
            masks.append(every_fourth_pixel(item, MAP))
            yield item

    train, held_maps = (
        extract(module.train_data[index] for index in track(indices, f"{name}, {what}"))
        for indices, what in ((kept, "training"), (held, "held out"))
    )
    test = extract(tested())
    return Images(train, test, torch.tensor(labels), torch.stack(masks) if has_masks(module) else None, held_maps)


def untrained(point: Point) -> WTFlowModel:
    """Build a point's model."""
    chosen = {name: value for name, value in point.items() if name not in EXTRAS and value is not None}
    return WTFlowModel(get_settings(**chosen)).eval()


def reference_of(x0: Tensor) -> Tensor:
    """Return about as many training images as WTFlow tells the contrast and the end of a training from."""
    return x0[:: len(x0) // REFERENCE_IMAGES + 1]


@torch.no_grad()
def features(model: WTFlowModel, maps: dict[str, Tensor], point: Point) -> Tensor:
    """Stack the layers of a point as the model's extractor does."""
    chosen = [maps[name] for name in point["layers"] or LAYERS[:3]]
    parts = zip(*(layer.split(BATCH) for layer in chosen), strict=True)
    return torch.cat([model.feature_extractor.stack([layer.float() for layer in part]) for part in parts])


@torch.no_grad()
def normalise(model: WTFlowModel, x: Tensor, point: Point) -> Tensor:
    """Fit the normalisation on training features, and apply it to them."""
    module: Any = model.normalization
    if module.needs_fit:
        module.ridge = point["ridge"]
        for part in x.split(BATCH):
            model.update(part, torch.zeros(len(part), dtype=torch.int64))
        model.finalize()
    return torch.cat([module(part) for part in x.split(BATCH)])


def train(model: WTFlowModel, x0: Tensor, point: Point) -> float:
    """Train a model's field as WTFlow does, on normalised features; return the seconds."""
    torch.manual_seed(point["seed"])
    s, loss = model.settings, WTFlowLoss()
    optimizer = torch.optim.AdamW(model.field.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)
    schedule = SCHEDULERS[s.scheduler](s.max_epochs * -(-len(x0) // BATCH))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    reference, losses = reference_of(x0), []
    begin = time.perf_counter()
    model.field.train()
    for _ in range(s.max_epochs):
        for batch in x0[torch.randperm(len(x0))].split(BATCH):
            optimizer.zero_grad()
            loss(*model.regress(batch)).backward()
            optimizer.step()
            scheduler.step()
            model.average()
        if s.plateau:
            losses.append(matching_loss_of(model, reference))
            if has_settled(losses, s.plateau):
                break
    return time.perf_counter() - begin


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
        flow, images = point["start_time"] is not None, self.images(data)
        model = untrained(point)
        training = json.dumps([data, flow, {name: value for name, value in point.items() if name not in INFERENCE}])
        if self.last[0] != training:
            x0 = normalise(model, features(model, images.train, point), point)
            seconds = train(model, x0, point) if flow else 0.0
            self.last = (training, model.state_dict(), reference_of(x0), seconds)
        _, state, reference, seconds = self.last
        # How the image score is taken belongs to the inference.
        own = {name: value for name, value in state.items() if not name.startswith("anomaly_map_generator")}
        model.load_state_dict(own, strict=False)
        model.eval()
        if not flow:
            model.flow = identity
        model.observe(reference, MAP)
        if not point["limit"]:
            model.anomaly_map_generator.limit.fill_(float("inf"))
            model.anomaly_map_generator.offset.zero_()
        return model, seconds

    def result(self, data: str, point: Point) -> Result:
        """Train at a point, and score the test images."""
        model, seconds = self.trained(data, point)
        scores, pixels = score(model, self.images(data).test, point)
        flow = point["start_time"] is not None
        parameters = sum(p.numel() for p in model.field.parameters()) if flow else 0
        return Result(scores, pixels, parameters, round(seconds, 1))


def identity(x0: Tensor, product: Tensor | None = None) -> Tensor:
    """No flow: the features stay where they are."""
    del product
    return x0


@torch.no_grad()
def score(model: WTFlowModel, maps: dict[str, Tensor], point: Point) -> tuple[Tensor, Tensor]:
    """Score images by their backbone maps: image scores, and every fourth pixel of the maps in each direction."""
    x = features(model, maps, point)
    parts = [model.score(model.normalization(part), MAP) for part in x.split(BATCH)]
    pixels = torch.cat([part.anomaly_map[:, 0, 2::4, 2::4] for part in parts])
    return torch.cat([part.pred_score for part in parts]), pixels


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
