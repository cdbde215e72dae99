"""The rows and the data sets of the accuracy benchmark: anomalib models on the same features of the same images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max, F1Score
from anomalib.models import AnomalibModule, Padim, Patchcore
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn

from anomalib_wtflow import FastflowBaseline, SyntheticParts, WTFlow
from anomalib_wtflow.anomaly_map import student
from anomalib_wtflow.diagnosis.data import mvtec_layout
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, packaged_weights

SHARED = Path(__file__).parents[2] / "shared" / "data"
LAYERS = ("blocks.2", "blocks.4")
"""The layers of anomalib's own models, at strides 8 and 16, as their layer2 and layer3 of a ResNet."""
IMAGE_SIZE = 256


def evaluator(own_threshold: bool) -> Evaluator:
    """Metrics of a row: areas, and F1 at the best threshold; F1 at the model's own one where it has one."""
    metrics: list[Any] = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUPR(fields=["pred_score", "gt_label"], prefix="image_"),
        F1Max(fields=["pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        F1Max(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]
    if own_threshold:
        metrics.append(F1Score(fields=["pred_label", "gt_label"], prefix="image_"))
    return Evaluator(test_metrics=metrics)


class Squash(PostProcessor):
    """Monotone map of raw scores and maps into (0, 1), for models whose own normalisation needs a validation set.

    ``1/2 + u / (2 (1 + |u|))`` with ``u = sign(x) log(1 + |x|)``: ranks stay, and torchmetrics, which takes values
    outside [0, 1] for logits, does not flatten them in a sigmoid.
    """

    def post_process_batch(self, batch: Batch) -> None:
        """Squash the scores and the maps of a batch in place."""
        for name in ("pred_score", "anomaly_map"):
            x = getattr(batch, name)
            u = x.sign() * x.abs().log1p()
            setattr(batch, name, 0.5 + 0.5 * u / (1 + u.abs()))


class Memo:
    """The backbone's output of images it has seen: no image passes the backbone twice in a process.

    Args:
        limit: Bytes of features that are kept; beyond them the backbone runs.
    """

    def __init__(self, limit: int = 6 * 2**30) -> None:
        self.store: dict[tuple, list[Tensor]] = {}
        self.limit = limit
        self.size = 0

    def wrap(self, network: nn.Module) -> None:
        """Put the memo before a timm feature network, which must be frozen and in evaluation mode.

        Its parameters and layers take part in the key, so that two backbones never share a feature.
        """
        forward = network.forward
        layers = tuple(network.feature_info.module_name()) if hasattr(network, "feature_info") else ()
        identity = (float(sum(p.double().abs().sum() for p in network.parameters())), layers)

        def remembered(images: Tensor) -> list[Tensor]:
            keys = [(identity, hash(image.numpy().tobytes())) for image in images]
            missing = [i for i, key in enumerate(keys) if key not in self.store]
            fresh: dict[int, list[Tensor]] = {}
            with torch.no_grad():
                for pair in torch.tensor(missing, dtype=torch.long).split(2):
                    maps = forward(images[pair])
                    for row, i in enumerate(pair.tolist()):
                        fresh[i] = [m[row].clone() for m in maps]
            for i, maps in fresh.items():
                size = sum(m.numel() * m.element_size() for m in maps)
                if self.size + size <= self.limit:
                    self.store[keys[i]] = maps
                    self.size += size
            rows = [fresh[i] if i in fresh else self.store[key] for i, key in enumerate(keys)]
            return [torch.stack(layer) for layer in zip(*rows, strict=True)]

        network.forward = remembered


def packaged_network() -> nn.Module:
    """EfficientNet-Lite0 with its packaged weights, as timm builds it, up to the layers that all rows use."""
    network = timm.create_model(DEFAULT_BACKBONE, features_only=True, exportable=True, out_indices=[2, 3]).eval()
    state = packaged_weights()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    if list(network.feature_info.module_name()) != list(LAYERS):
        msg = f"timm's layers are {network.feature_info.module_name()}, not {LAYERS}: install the timm of the table."
        raise RuntimeError(msg)
    return network.requires_grad_(requires_grad=False)


class LiteFastflowModel(FastflowModel):
    """anomalib's FastFlow blocks, norms and map on EfficientNet-Lite0; its own class refuses that backbone."""

    def __init__(self, input_size: tuple[int, int], flow_steps: int = 8) -> None:
        nn.Module.__init__(self)
        self.input_size = input_size
        self.feature_extractor = packaged_network()
        info = self.feature_extractor.feature_info
        self.norms, self.fast_flow_blocks = nn.ModuleList(), nn.ModuleList()
        for channels, stride in zip(info.channels(), info.reduction(), strict=True):
            shape = [channels, input_size[0] // stride, input_size[1] // stride]
            self.norms.append(nn.LayerNorm(shape))
            self.fast_flow_blocks.append(
                create_fast_flow_block(
                    input_dimensions=shape, conv3x3_only=False, hidden_ratio=1.0, flow_steps=flow_steps
                )
            )
        self.anomaly_map_generator = AnomalyMapGenerator(input_size=input_size)


class LiteFastflow(FastflowBaseline):
    """anomalib's Fastflow, with its loss, optimiser and 8 steps, on EfficientNet-Lite0's features."""

    def __init__(self, max_epochs: int = 20, **kwargs: Any) -> None:
        super().__init__(pre_trained=False, **kwargs)
        self.max_epochs = max_epochs
        self.model = LiteFastflowModel((IMAGE_SIZE, IMAGE_SIZE))


class NoFlow(WTFlow):
    """Control: WTFlow whose flow is the identity, so that the map comes from the normalised features themselves."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_epochs=1, **kwargs)
        self.model.flow = lambda x0: x0
        self.model.field.requires_grad_(requires_grad=False)

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Train nothing: the statistics of the features are gathered before the first step."""
        del batch, args, kwargs
        return torch.zeros((), requires_grad=True)


class NearestNeighbour(NoFlow):
    """Control: distance to the nearest of all normal training features (no coreset), on WTFlow's own features.

    The distance takes the flow's place: ``1/2 mean_c y_c^2`` becomes half its square per channel.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bank: list[Tensor] = []
        self.model.observe = lambda *_: None  # the contrast's limit would be that of the features without a bank
        self.model.predict = self.predict_from_bank

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the features of a batch."""
        self.bank.append(batch.features.movedim(1, -1).flatten(0, -2))
        return super().training_step(batch, *args, **kwargs)

    def predict_from_bank(self, features: Tensor, image_size: tuple[int, int] | torch.Size) -> InferenceBatch:
        """Score backbone features, as ``WTFlowModel.predict`` does."""
        x = self.model.normalization(features).movedim(1, -1)
        self.bank = [torch.cat(self.bank)]
        squares = self.bank[0].square().sum(1)
        rows = x.flatten(0, -2)
        nearest = [rows.square().sum(1) + (squares - 2 * rows @ self.bank[0].T).amin(1) for rows in rows.split(256)]
        energy = torch.cat(nearest).clamp(min=0).view(x.shape[:-1])[:, None] / (2 * x.shape[-1])
        anomaly_map, score = self.model.anomaly_map_generator(student(energy), image_size)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)


def neighbours(kind: type, **kwargs: Any) -> AnomalibModule:
    """Build one of anomalib's feature-statistics models on the packaged weights."""
    model = kind(backbone=DEFAULT_BACKBONE, layers=list(LAYERS), pre_trained=False, **kwargs)
    network = model.model.feature_extractor.feature_extractor
    network.load_state_dict(packaged_network().state_dict())
    network.requires_grad_(requires_grad=False)
    return model


@dataclass(frozen=True)
class Row:
    """A model of the benchmark.

    Attributes:
        build: Builds the model from keyword arguments that all rows share.
        settings: What the JSON and the table say about it, and what ``build`` gets.
        batch_size: Training batch size.
        seeded: Whether its result depends on the seed; if not, one seed is enough.
    """

    build: Callable[..., AnomalibModule]
    settings: dict[str, Any]
    batch_size: int = 32
    seeded: bool = True


ROWS: dict[str, Row] = {
    "WTFlow": Row(WTFlow, {}),
    "WTFlow, authors' recipe": Row(
        WTFlow,
        {
            "layers": ["blocks.4"],
            "pool_size": 3,
            "pool_stride": 2,
            "normalization": "layer_norm",
            "network": "unet",
            "fields": "joint",
            "width": 48,
            "coupling": "worst",
            "path": "linear",
            "start_time": 0.0,
            "time_sampling": "uniform",
            "density": "gaussian",
            "anomaly_map": "relative",
            "top_fraction": 0.03,
            "sigma": 0.0,
            "image_score": "map",
            "contrast": 0.0,
            "max_epochs": 100,
            "learning_rate": 1e-4,
            "scheduler": "step",
        },
        batch_size=8,
    ),
    # anomalib's default of 10 % takes half an hour on 209 images and two cores: the greedy selection is quadratic.
    "Patchcore": Row(lambda **kwargs: neighbours(Patchcore, **kwargs), {"coreset_sampling_ratio": 0.005}),
    "Padim": Row(lambda **kwargs: neighbours(Padim, **kwargs), {"n_features": 100}),
    "FastFlow": Row(LiteFastflow, {"max_epochs": 20}),
    "No flow": Row(NoFlow, {"normalization": "whitening"}, seeded=False),
    "Nearest neighbour": Row(NearestNeighbour, {}, seeded=False),
}
EXCEPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    # 1 % of 673 792 patches takes half an hour.
    ("Patchcore", "magnetic_tile"): {"coreset_sampling_ratio": 0.0025},
}


def feature_network(model: AnomalibModule) -> nn.Module:
    """Find the timm network inside a row's model: WTFlow, anomalib and FastFlow keep it in other places."""
    extractor = model.model.feature_extractor
    return getattr(extractor, "network", getattr(extractor, "feature_extractor", extractor))


def settings_of(row: str, data: str) -> dict[str, Any]:
    """Return a row's settings on a data set."""
    return {**ROWS[row].settings, **EXCEPTIONS.get((row, data), {})}


def build(row: str, data: str, memo: Memo | None, **more: Any) -> tuple[AnomalibModule, dict[str, Any]]:
    """Build a row's model, with more settings if given, and say with which settings of the row."""
    settings = settings_of(row, data)
    ours = isinstance(ROWS[row].build, type) and issubclass(ROWS[row].build, WTFlow)
    extra: dict[str, Any] = {"evaluator": evaluator(own_threshold=ours), "visualizer": False}
    if not ours:
        extra["pre_processor"] = WTFlow.configure_pre_processor(IMAGE_SIZE)
        extra["post_processor"] = Squash(enable_normalization=False, enable_thresholding=False)
    elif row != "WTFlow":
        extra["image_size"] = IMAGE_SIZE
    model = ROWS[row].build(**settings, **extra, **more)
    if memo is not None:
        memo.wrap(feature_network(model))
    return model, settings


def quiet_engine(folder: str, **kwargs: Any) -> Engine:
    """Build an engine that writes below ``folder``, prints nothing, and never validates on the test set."""
    return Engine(
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **kwargs,
    )


def data_module(name: str, root: Path | None = None, batch_size: int = 32) -> AnomalibDataModule:
    """Build a data module whose whole test set is tested, by name.

    Validation is the test set again, since anomalib 2.7 fails without one; the benchmark runs no validation.

    Args:
        name: ``mvtec_bottle``, ``magnetic_tile``, ``synthetic``, a folder in MVTec's layout, or a class of
            ``anomalib.data`` with its category, as ``MVTecAD:screw``, ``Visa:candle``, ``BTech:01``.
        root: Folder of the last kind; None for anomalib's default.
        batch_size: Training batch size.

    Raises:
        FileNotFoundError: If there is no such data set.
    """
    common = {"train_batch_size": batch_size, "num_workers": 0, "val_split_mode": "same_as_test"}
    if name == "synthetic":
        return SyntheticParts(**common)
    if ":" in name and not Path(name).exists():
        kind, category = name.split(":", 1)
        options = {"category": category, **common, **({"root": str(root)} if root else {})}
        return get_datamodule({"class_path": f"anomalib.data.{kind}", "init_args": options})
    folder = {"mvtec_bottle": SHARED / "mvtec_bottle" / "bottle"}.get(name, SHARED / name)
    folder = folder if folder.is_dir() else Path(name)
    if not folder.is_dir():
        msg = (
            f"There is no data set '{name}': give mvtec_bottle, magnetic_tile, synthetic, a folder in MVTec's layout, "
            "or a class and category as MVTecAD:screw."
        )
        raise FileNotFoundError(msg)
    module = mvtec_layout(folder)
    module.train_batch_size = batch_size
    return module
