"""Experiments on cached features: the backbone's layers computed once, and small fields trained and scored on them."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow import WTFlow
from anomalib_wtflow.anomaly_map import AnomalyMapGenerator, density_proxy
from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import get_field
from anomalib_wtflow.flow.normalization import Whitening, get_normalization
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import regress, thin
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.flow.solver import get_solver
from anomalib_wtflow.loss import WTFlowLoss
from anomalib_wtflow.training.feature_caching import LIMIT_IMAGES
from benchmarks.common import track
from benchmarks.datasets import data_module, every_fourth_pixel, has_masks

STRIDES = {4: "blocks.1", 8: "blocks.2", 16: "blocks.4", 32: "blocks.6"}
CHANNELS = {4: 24, 8: 40, 16: 112, 32: 320}
MAP = (256, 256)
METRICS = ("image_AUROC", "image_AUPR", "image_F1Max", "pixel_AUROC", "pixel_AUPRO", "pixel_F1Max")
CONSTANT = {
    "fields": "per_layer",
    "network_version": 2,
    "thinning": 2,
    "time_sampling": "uniform",
    "score_window": 3,
}
"""What was a choice once, and stands in the JSON; ``network_version`` is the shape of the pointwise network."""


@dataclass(frozen=True)
class Setting:
    """One point of an experiment; the defaults are WTFlow's."""

    strides: tuple[int, ...] = (4, 8, 16)
    side: int = 16
    pool: int = 3
    standardise: bool = False
    normalization: str = "channel"
    ridge: float = 0.01
    network: str = "pointwise"
    width: int | None = None
    depth: int | None = None
    path: str = "variance_preserving"
    coupling: str = "worst"
    blocks: int = 1
    epochs: int = 80
    batch_size: int = 32
    learning_rate: float = 3e-3
    scheduler: str = "cosine"
    start_time: float | None = 0.35
    steps: int = 1
    density: str = "student"
    anomaly_map: str = "absolute"
    smoothing: float = 4.0
    top_fraction: float = 0.03
    image_score: str = "features"
    contrast: float = 0.75
    limit: bool = True
    seed: int = 0

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Setting":
        """Build a setting from what the JSON or the command line say; the rest are the defaults."""
        chosen = {name: value for name, value in plain.items() if name not in CONSTANT}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})

    def plain(self) -> dict[str, Any]:
        """Return the setting as the JSON has it."""
        return {**CONSTANT, **asdict(self), "strides": list(self.strides)}

    @property
    def channels(self) -> list[int]:
        """Channels of the layers."""
        return [CHANNELS[stride] for stride in self.strides]


SCORE = ("density", "anomaly_map", "smoothing", "top_fraction", "image_score", "contrast", "limit")
"""What turns end points of the flow into a map and a score."""
INFERENCE = ("start_time", "steps", *SCORE)
"""What does not need another training."""
FEATURES = ("strides", "side", "pool", "standardise", "normalization", "ridge", *SCORE)
"""What the no-flow control depends on."""


@dataclass
class Images:
    """Backbone maps by stride, labels, and every fourth pixel of the masks, or None if there are none."""

    train: dict[int, Tensor]
    test: dict[int, Tensor]
    labels: Tensor
    masks: Tensor | None


def load(name: str) -> Images:
    """Extract all layers of a data set, in float16; of the training images, the 80 % that WTFlow keeps."""
    module = data_module(name)
    extractor = FeatureExtractor(layers=list(STRIDES.values()))
    transform = WTFlow.configure_pre_processor().transform
    order = torch.randperm(len(module.train_data), generator=torch.Generator().manual_seed(0)).tolist()
    kept = sorted(order[round(0.2 * len(order)) :])
    train, test, labels, masks = [], [], [], []
    for index in track([*kept, *range(len(module.test_data))], name):
        testing = len(train) == len(kept)
        item = (module.test_data if testing else module.train_data)[index]
        with torch.no_grad():
            (test if testing else train).append([m.half() for m in extractor.network(transform(item.image[None]))])
        if testing:
            labels.append(bool(item.gt_label))
            masks.append(every_fourth_pixel(item, MAP))
    maps = (dict(zip(STRIDES, map(torch.cat, zip(*rows, strict=True)), strict=True)) for rows in (train, test))
    return Images(*maps, torch.tensor(labels), torch.stack(masks) if has_masks(module) else None)


def features(maps: dict[int, Tensor], setting: Setting) -> Tensor:
    """Pool, resize and stack the layers of a setting."""
    layers = [F.avg_pool2d(maps[s].float(), setting.pool, 1, setting.pool // 2) for s in setting.strides]
    size = (setting.side, setting.side)
    x = torch.cat([F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in layers], dim=1)
    if setting.standardise:
        x = x - x.mean((2, 3), keepdim=True)
        x = x / (x.std((2, 3), keepdim=True) + 0.1)
    return x


@torch.no_grad()
def normalise(images: Images, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return a setting's features of both sets, by a normalisation that is fitted on the training images."""
    train, test = features(images.train, setting), features(images.test, setting)
    module: Any = get_normalization(setting.normalization, train.shape[1])
    if isinstance(module, Whitening):
        module.ridge = setting.ridge
        for batch in train.split(32):
            module.update(batch)
        module.finalize()
    return torch.cat([module(b) for b in train.split(32)]), torch.cat([module(b) for b in test.split(32)])


def split(x: Tensor, blocks: int) -> Tensor:
    """Cut each map into ``blocks x blocks`` samples of their own, so that each draws its own time."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, blocks, h // blocks, blocks, w // blocks)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h // blocks, w // blocks)


def train(x0: Tensor, setting: Setting) -> tuple[nn.Module, float]:
    """Train a field as WTFlow does by default, epoch by epoch; return it and the seconds."""
    torch.manual_seed(setting.seed)
    field = get_field(setting.network, setting.channels, setting.width, setting.depth)
    path, coupling, loss = ProbabilityPath(setting.path), get_coupling(setting.coupling), WTFlowLoss()
    optimizer = torch.optim.AdamW(field.parameters(), lr=setting.learning_rate, weight_decay=1e-2)
    batches = -(-len(x0) // setting.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULERS[setting.scheduler](setting.epochs * batches))
    start = time.perf_counter()
    field.train()
    for _ in range(setting.epochs):
        for batch in x0[torch.randperm(len(x0))].split(setting.batch_size):
            points = split(thin(batch) if field.pointwise else batch, setting.blocks)
            optimizer.zero_grad()
            loss(*regress(field, points, path, coupling)).backward()
            optimizer.step()
            scheduler.step()
    return field.eval(), time.perf_counter() - start


@torch.no_grad()
def end_points(field: nn.Module, x0: Tensor, setting: Setting) -> Tensor:
    """Where the flow carries the features."""
    solver, path = get_solver("euler", setting.steps), ProbabilityPath(setting.path)
    scale = path.coefficients(torch.tensor(setting.start_time)).a.item()
    return torch.cat([x + solver.mean_velocity(field, scale * x, setting.start_time, 1.0) for x in x0.split(64)])


def score(y: Tensor, reference: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """Return image scores, and every fourth pixel of the maps, of end points.

    Those of training images, the reference, set the limit of the contrast.
    """
    s = setting
    make = AnomalyMapGenerator(s.anomaly_map, s.top_fraction, s.smoothing, s.image_score, s.contrast, s.channels)
    if s.limit:
        make.observe(density_proxy(reference, s.channels, s.density), MAP)
    parts = [make(density_proxy(part, s.channels, s.density), MAP) for part in y.split(64)]
    return torch.cat([scores for _, scores in parts]), torch.cat([maps[:, 0, 2::4, 2::4] for maps, _ in parts])


def measure(scores: Tensor, pixels: Tensor, images: Images) -> dict[str, float]:
    """All six metrics; without masks, the three of the images."""
    label, value = images.labels.numpy(), scores.numpy()
    values = [roc_auc_score(label, value), average_precision_score(label, value), best_f1(label, value)]
    if images.masks is not None:
        aupro = _AUPRO(fpr_limit=0.3)
        aupro.update(pixels, images.masks)
        mask, flat = images.masks.flatten().numpy(), pixels.flatten().numpy()
        values += [roc_auc_score(mask, flat), float(aupro.compute()), best_f1(mask, flat)]
    return {name: round(float(value), 5) for name, value in zip(METRICS, values, strict=False)}


def best_f1(label: np.ndarray, score: np.ndarray) -> float:
    """Largest F1 of all thresholds."""
    precision, recall, _ = precision_recall_curve(label, score)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


class Cache:
    """Backbone maps of the data sets, and the field that was trained last."""

    def __init__(self) -> None:
        self.loaded: dict[str, Images] = {}
        self.trained: tuple[Any, ...] = ()

    def images(self, data: str) -> Images:
        """Return a data set's maps."""
        if data not in self.loaded:
            self.loaded[data] = load(data)
        return self.loaded[data]

    def field(self, data: str, setting: Setting) -> tuple[nn.Module, Tensor, Tensor, float]:
        """Return the trained field, features of the test set and of training images, and the seconds of training."""
        training = (data, replace(setting, **{name: getattr(Setting, name) for name in INFERENCE}))
        if not self.trained or self.trained[0] != training:
            x, y = normalise(self.images(data), setting)
            field, seconds = train(x, setting)
            self.trained = (training, field, y, x[torch.randperm(len(x))[:LIMIT_IMAGES]], seconds)
        return self.trained[1:]

    def scores(self, data: str, setting: Setting) -> tuple[Tensor, Tensor]:
        """Return the test images' scores, and every fourth pixel of their maps; without a start time, of no flow."""
        if setting.start_time is None:
            x, y = normalise(self.images(data), setting)
            return score(y, x[:: len(x) // LIMIT_IMAGES + 1], setting)
        field, *both, _ = self.field(data, setting)
        return score(*(end_points(field, x, setting) for x in both), setting)
