"""The models of the benchmarks: WTFlow, anomalib's models and two controls, on the same features of the same images."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from anomalib.data import Batch
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max, F1Score, create_anomalib_metric
from anomalib.models import AnomalibModule, MHPatchcore, Padim, Patchcore
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn
from torchmetrics.classification import BinarySpecificity

from anomalib_wtflow import FastflowBaseline, WTFlow
from anomalib_wtflow.anomaly_map import student_density
from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE
from anomalib_wtflow.features.store import Row
from anomalib_wtflow.features.weights import packaged_weights
from anomalib_wtflow.fit import fit_background, fit_statistics

LAYERS = ("blocks.2", "blocks.4")
"""The layers of anomalib's own models, at strides 8 and 16, as their layer2 and layer3 of a ResNet."""
IMAGE_SIZE = 256
Specificity = create_anomalib_metric(BinarySpecificity)


def evaluator(own_threshold: bool, masks: bool = True) -> Evaluator:
    """Metrics of images, and of pixels if there are masks: areas, and F1 at the best threshold or the model's own."""
    image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    metrics: list[Any] = [metric(fields=image, prefix="image_") for metric in (AUROC, AUPR, F1Max)]
    if masks:
        metrics += [metric(fields=pixel, prefix="pixel_") for metric in (AUROC, AUPRO, F1Max)]
    if own_threshold:
        metrics += [metric(fields=["pred_label", "gt_label"], prefix="image_") for metric in (F1Score, Specificity)]
    return Evaluator(test_metrics=metrics)


class Squash(PostProcessor):
    """Monotone map of raw scores and maps into (0, 1), for models whose own normalisation needs a validation set.

    ``1/2 + u / (2 (1 + |u|))`` with ``u = sign(x) log(1 + |x|)``: ranks stay. anomalib's normalisation clamps to
    [0, 1], which ties what lies beyond the validation set. ``PostProcessor(enable_normalization=False)`` alone is not
    enough: torchmetrics takes values outside [0, 1] for logits, and its float32 sigmoid is 1 from 17 on, which ties all
    large distances.
    """

    def post_process_batch(self, batch: Batch) -> None:
        """Squash the scores and the maps of a batch in place."""
        for name in ("pred_score", "anomaly_map"):
            x = getattr(batch, name)
            u = x.sign() * x.abs().log1p()
            setattr(batch, name, 0.5 + 0.5 * u / (1 + u.abs()))


def packaged_network() -> nn.Module:
    """EfficientNet-Lite0 with its packaged weights, as timm builds it, up to the layers that all rows use."""
    network = timm.create_model(DEFAULT_BACKBONE, features_only=True, exportable=True, out_indices=[2, 3]).eval()
    network.load_state_dict(packaged_weights(network))
    if list(network.feature_info.module_name()) != list(LAYERS):
        msg = f"timm's layers are {network.feature_info.module_name()}, not {LAYERS}: install the timm of the table."
        raise RuntimeError(msg)
    return network.requires_grad_(requires_grad=False)


class LiteFastflowModel(FastflowModel):
    """anomalib's FastFlow blocks, norms and map on EfficientNet-Lite0; its own class refuses that backbone."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.input_size = (IMAGE_SIZE, IMAGE_SIZE)
        self.feature_extractor = packaged_network()
        info = self.feature_extractor.feature_info
        shapes = [(c, IMAGE_SIZE // s, IMAGE_SIZE // s) for c, s in zip(info.channels(), info.reduction(), strict=True)]
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)
        block = {"conv3x3_only": False, "hidden_ratio": 1.0, "flow_steps": 8}
        self.fast_flow_blocks = nn.ModuleList(create_fast_flow_block(list(shape), **block) for shape in shapes)
        self.anomaly_map_generator = AnomalyMapGenerator(input_size=self.input_size)


class LiteFastflow(FastflowBaseline):
    """anomalib's Fastflow, with its loss, optimiser and 8 steps, on EfficientNet-Lite0's features."""

    def __init__(self, max_epochs: int = 20, **kwargs: Any) -> None:
        super().__init__(pre_trained=False, **kwargs)
        self.max_epochs = max_epochs
        self.model = LiteFastflowModel()


class NoFlow(WTFlow):
    """Control: WTFlow whose flow is the identity, so that the map comes from the normalised features themselves."""

    def __init__(self, normalization: str = "channel", **kwargs: Any) -> None:
        super().__init__(overrides={"normalization": normalization}, **kwargs)
        self.model.flow = self.carry
        self.model.field.requires_grad_(requires_grad=False)

    def carry(self, x0: Tensor, index: Tensor) -> Tensor:
        """Leave the features where they are."""
        del index
        return x0

    def _fit_model(self, rows: list[Row]) -> None:
        x0 = [row.features for row in rows]
        shown = fit_statistics(self.model, x0, torch.tensor([self.products.index(row.product) for row in rows]))
        self.learn(x0, shown)

    def learn(self, x0: list[Tensor], index: Tensor) -> None:
        """Learn the background level from normalised features."""
        fit_background(self.model, x0, index, self.image_size)


class PositionNoFlow(NoFlow):
    """Control: as ``NoFlow``, less the mean of the normalised training features at each position."""

    mean: Tensor | float = 0.0

    def carry(self, x0: Tensor, index: Tensor) -> Tensor:
        """Take the mean off."""
        return super().carry(x0, index) - self.mean

    def learn(self, x0: list[Tensor], index: Tensor) -> None:
        """Learn the mean too."""
        self.mean = torch.stack(x0).mean(dim=0)
        super().learn(x0, index)


class NearestNeighbour(NoFlow):
    """Control: distance to the nearest of all normal training features (no coreset), on WTFlow's own features.

    The distance takes the flow's place: ``1/2 mean_c y_c^2`` becomes half its square per channel. The background level
    is not fitted: the training features' distances to themselves are 0.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model.log_density = self.log_density

    def learn(self, x0: list[Tensor], index: Tensor) -> None:
        """Keep the features."""
        del index
        self.bank = torch.stack(x0).movedim(1, -1).flatten(0, -2)

    def log_density(self, x0: Tensor) -> Tensor:
        """Return the density of the distance, ``(N, 1, H, W)``."""
        x = x0.movedim(1, -1)
        squares = self.bank.square().sum(1)
        rows = x.flatten(0, -2)
        nearest = [part.square().sum(1) + (squares - 2 * part @ self.bank.T).amin(1) for part in rows.split(256)]
        return student_density(torch.cat(nearest).clamp(min=0).view(x.shape[:-1])[:, None] / (2 * x.shape[-1]))


def neighbours(kind: type, **kwargs: Any) -> AnomalibModule:
    """Build one of anomalib's feature-statistics models on the packaged weights."""
    model = kind(backbone=DEFAULT_BACKBONE, layers=list(LAYERS), pre_trained=False, **kwargs)
    network = model.model.feature_extractor.feature_extractor
    network.load_state_dict(packaged_network().state_dict())
    network.requires_grad_(requires_grad=False)
    return model


class Model(NamedTuple):
    """A model: what builds it, with which settings and batch size, and whether its result depends on a seed."""

    build: Callable[..., AnomalibModule]
    settings: Mapping[str, Any] = MappingProxyType({})
    batch_size: int = 32
    seeded: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is a WTFlow, which has its own pre-processing, threshold and seed."""
        return isinstance(self.build, type) and issubclass(self.build, WTFlow)


PAPER = {"recipe": "paper", "backbone": DEFAULT_BACKBONE, "layers": ["blocks.4"], "overrides": {"width": 48}}
"""The authors' recipe on the backbone of the others, and of a width that two cores train in minutes."""
ROWS: dict[str, Model] = {
    "WTFlow": Model(WTFlow),
    "WTFlow, authors' recipe": Model(WTFlow, PAPER, batch_size=8),
    # anomalib's default of 10 % takes half an hour on 209 images and two cores: the greedy selection is quadratic.
    "Patchcore": Model(partial(neighbours, Patchcore), {"coreset_sampling_ratio": 0.005}),
    "MHPatchcore": Model(partial(neighbours, MHPatchcore)),
    "Padim": Model(partial(neighbours, Padim), {"n_features": 100}),
    "FastFlow": Model(LiteFastflow, {"max_epochs": 20}),
    "No flow": Model(NoFlow, {"normalization": "whitening"}, seeded=False),
    "No flow, position means": Model(PositionNoFlow, {"normalization": "whitening"}, seeded=False),
    "Nearest neighbour": Model(NearestNeighbour, seeded=False),
}
# 1 % of 673 792 patches takes half an hour.
EXCEPTIONS = {("Patchcore", "magnetic_tile"): {"coreset_sampling_ratio": 0.0025}}


def timed_fit(model: WTFlow, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Have a model note the seconds of its fit, which comes after the collection of features."""
    fit, seconds = model.fit, []

    def timed() -> None:
        begin = clock()
        fit()
        seconds.append(clock() - begin)

    model.fit = timed  # type: ignore[method-assign]
    return seconds


def with_statistics(model: WTFlow, features: Tensor, index: Tensor) -> WTFlow:
    """Give a model statistics of features and thresholds of 1 in place of a training, which changes no time."""
    count = int(index.max()) + 1
    model.products = [f"product {k:02d}" for k in range(count)]
    model.model.set_products(count)
    rows = list(features)
    shown = fit_statistics(model.model, rows, index)
    fit_background(model.model, rows, shown, (IMAGE_SIZE, IMAGE_SIZE))
    ones = torch.ones(count)
    model.post_processor.calibrate(Scores(ones, ones, torch.arange(count)), count)
    return model.eval()


def feature_network(model: AnomalibModule) -> nn.Module:
    """Find the timm network inside a row's model: WTFlow, anomalib and FastFlow keep it in other places."""
    extractor = model.model.feature_extractor
    return getattr(extractor, "network", getattr(extractor, "feature_extractor", extractor))


def model_bytes(model: Any) -> int:
    """Size of what a model has learnt: its state without the backbone's weights."""
    backbone = {id(value) for value in feature_network(model).state_dict(keep_vars=True).values()}
    state = model.model.state_dict(keep_vars=True).values()
    return sum(value.numel() * value.element_size() for value in state if id(value) not in backbone)


def settings_of(row: str, data: str) -> dict[str, Any]:
    """Return a row's settings on a data set."""
    return {**ROWS[row].settings, **EXCEPTIONS.get((row, data), {})}


def build(row: str, data: str, masks: bool = True, **more: Any) -> AnomalibModule:
    """Build a row's model, with more settings if given."""
    ours = ROWS[row].ours
    extra: dict[str, Any] = {"evaluator": evaluator(ours, masks), "visualizer": False}
    if not ours:
        extra["pre_processor"] = WTFlow.configure_pre_processor(IMAGE_SIZE)
        extra["post_processor"] = Squash(enable_normalization=False, enable_thresholding=False)
    elif row != "WTFlow":
        extra["image_size"] = IMAGE_SIZE
    return ROWS[row].build(**settings_of(row, data), **extra, **more)


def quiet_engine(folder: str, **kwargs: Any) -> Engine:
    """Build an engine that writes below ``folder``, prints nothing, and never validates on the test set."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, limit_val_batches=0, **quiet, **kwargs)
