"""WT-Flow as an anomalib model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize
from tqdm import tqdm

from anomalib_wtflow import __version__
from anomalib_wtflow._registration import REPORTS, register_model
from anomalib_wtflow.checkpoint import KEY, raise_for_content, raise_for_settings, read_checkpoint
from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.deploy.exports import Exports
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, get_data_config, get_image_size
from anomalib_wtflow.features.store import FeatureStore, Row
from anomalib_wtflow.fit import fit_model, score_rows
from anomalib_wtflow.images import files_of, marks_of, raise_for_broken, raise_for_deep, threshold_images
from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.settings import ARGUMENTS, Settings, documented, get_settings
from anomalib_wtflow.torch_model import WTFlowModel


@register_model
@documented
class WTFlow(Exports, MemoryBankMixin, AnomalibModule):  # type: ignore[misc]
    """Time-reversed flow matching with worst transport on a frozen backbone (arXiv 2508.05461).

    The training epoch collects the features of good images, as PatchCore's does. Then :meth:`fit` trains the field on
    them, once, and the engine validates, tests and saves. ``max_epochs`` is the fit's.

    Args:
        recipe: Named settings to start from: ``default``, or ``paper`` for the authors' recipe.
        overrides: Any other setting by name, as ``--model.overrides.coupling independent``; the command
            ``anomalib-wtflow settings`` lists them with their meanings and defaults.
        pre_processor: As in anomalib; True for a resize to ``image_size`` and the backbone's own mean and deviation.
        post_processor: As in anomalib; True for :class:`anomalib_wtflow.post_processor.WTFlowPostProcessor`.
        evaluator: As in anomalib.
        visualizer: As in anomalib.

    Raises:
        WTFlowError: If a name is unknown or a number is out of range; the message lists what is valid.
    """

    model: WTFlowModel

    def __init__(
        self,
        backbone: str | None = None,
        layers: Sequence[str] | None = None,
        pre_trained: bool = Settings.pre_trained,
        weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        recipe: str = "default",
        overrides: dict[str, Any] | None = None,
        false_alarm_rate: float | None = Settings.false_alarm_rate,
        max_epochs: int | None = None,
        learning_rate: float | None = None,
        start_from: str | Path | None = None,
        seed: int = Settings.seed,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in ARGUMENTS and value is not None}
        given["false_alarm_rate"] = false_alarm_rate
        self.settings = get_settings(recipe, overrides, **given)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(self.settings.image_size, self.settings.backbone)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.model = WTFlowModel(self.settings)
        self.store = FeatureStore(0)
        self.products: list[str] = [""]
        self.known_products: list[str] = []
        """Products of the model that the training starts from."""
        self.marks = {"training": marks_of([]), "calibration": marks_of([])}
        """Marks of the images that the field was trained on, and of those that the threshold comes from."""
        if self.settings.start_from is not None:
            self._start_from(self.settings.start_from)

    @classmethod
    def configure_pre_processor(
        cls, image_size: int | tuple[int, int] | None = None, backbone: str = DEFAULT_BACKBONE
    ) -> PreProcessor:
        """Build the pre-processor: resize, then ``(x - mean) / std`` of the backbone.

        The resize is not antialiased: exported graphs cannot antialias, and where training could, the scores of good
        images larger than ``image_size`` would rise in production, and the false-alarm rate with them.

        Args:
            image_size: Side, or height and width, in pixels; None for the backbone's own.
            backbone: Name of the timm model that the statistics belong to.
        """
        config = get_data_config(backbone)
        resize = Resize(get_image_size(backbone, image_size), antialias=False)
        return PreProcessor(transform=Compose([resize, Normalize(mean=config.mean, std=config.std)]))

    def configure_post_processor(self) -> PostProcessor:
        """Build the post-processor of the settings' false-alarm rate."""
        return WTFlowPostProcessor(self.settings.false_alarm_rate)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add the registered reports to anomalib's components."""
        components = super().configure_callbacks()
        assert isinstance(components, Sequence)
        return [*components, *(report() for report in REPORTS)]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Train for one epoch, which collects features; validate nothing before it."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "val_check_interval": 1.0}

    @property
    def learning_type(self) -> LearningType:
        """Return ``ONE_CLASS``: training uses normal images only."""
        return LearningType.ONE_CLASS

    def configure_optimizers(self) -> None:
        """Build none: :meth:`fit` has its own."""

    def on_train_start(self) -> None:
        """Start a new fit."""
        self._is_fitted = torch.tensor([False], device=self.device)
        s = self.settings
        self.store = FeatureStore(s.feature_memory * 2**30 / self.trainer.world_size, s.seed + self.global_rank)

    @torch.no_grad()
    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Collect the features of one batch."""
        del args, kwargs
        assert isinstance(batch.image, Tensor)
        features = self.model.extract(batch.image)
        paths = files_of(batch, f"image {self.global_rank} {self.store.number}")
        raise_for_deep(paths)
        raise_for_broken("features", paths, batch.image, features)
        products = getattr(batch, "product", None) or [self._product_name()] * len(features)
        self.store.add(features, paths, products)
        self.image_size = (batch.image.shape[-2], batch.image.shape[-1])
        return torch.zeros((), requires_grad=True)  # Lightning wants a loss

    def fit(self) -> None:
        """Fit the model to the collected features, in all processes; the mixin calls this once.

        Raises:
            WTFlowError: If there are no training images, or too few of a product.
        """
        world, strategy = self.trainer.world_size, self.trainer.strategy
        if world > 1:
            self.store = self.store.gathered(strategy.broadcast, world, self.global_rank)
        rows, self.store = self.store.rows(), FeatureStore(0)
        if not rows:
            msg = "There are no training images: check the folders of the data module, or load a trained checkpoint."
            raise WTFlowError(msg)
        rate = getattr(self.post_processor, "false_alarm_rate", None)
        files = {row.path: row.product for row in rows}
        held, validation = threshold_images(self.trainer, files, rate, self.settings.calibration_ratio)
        calibration = [row for row in rows if row.path in held]
        rows = [row for row in rows if row.path not in held]
        with torch.inference_mode(mode=False), torch.enable_grad():
            self._set_products(sorted(set(files.values())))
            self.marks = {
                "training": marks_of([row.path for row in rows]),
                "calibration": marks_of([*held, *validation]),
            }
            self._fit_model(rows)
            if world > 1:  # the processes differ by rounding
                self.load_state_dict(strategy.broadcast(self.state_dict()))
            if isinstance(self.post_processor, WTFlowPostProcessor) and rate is not None:
                features = [row.features for row in calibration]
                with self.trainer.precision_plugin.forward_context():  # as in validation and test
                    scores = Scores.of(*score_rows(self.model, features, self.image_size)) if features else None
                self.post_processor.begin(self.products, validation, scores)
                if not self.trainer.validating:
                    self.post_processor.set_thresholds(self.trainer)

    def _fit_model(self, rows: list[Row]) -> None:
        index = torch.tensor([self.products.index(row.product) for row in rows])
        features = [row.features for row in rows]
        rows.clear()  # the features are normalised in place, and would be kept twice
        shown = self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero

        def log(epoch: int, loss: float) -> None:
            for logger in self.trainer.loggers:
                logger.log_metrics({"train_loss": loss}, epoch)

        bar = partial(tqdm, desc="Fitting the field", leave=False, disable=not shown, unit="epoch")
        losses = fit_model(self.model, features, index, self.image_size, bar, log)
        if len(losses) < self.settings.max_epochs:
            rank_zero_info(f"The fit stopped after {len(losses)} epochs: the loss no longer falls (setting plateau).")

    def _product_name(self) -> str:
        """Return the product's name for a data module without products: its category or name."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return str(getattr(datamodule, "category", None) or getattr(datamodule, "name", "parts"))

    def _set_products(self, names: list[str]) -> None:
        missing = [name for name in self.known_products if name not in names]
        if missing:
            msg = (
                f"The model of start_from knows the product '{missing[0]}', which has no training images here: give "
                f"the images of all its products ({', '.join(self.known_products)})."
            )
            raise WTFlowError(msg)
        self.products = [*self.known_products, *(name for name in names if name not in self.known_products)]
        self.model.set_products(len(self.products), len(self.known_products))
        if not self.known_products:
            self.model.field.load_state_dict(self.model.build_field().state_dict())

    def _start_from(self, path: str | Path) -> None:
        """Take field, statistics and products of a trained model."""
        checkpoint = read_checkpoint(path)
        raise_for_settings(checkpoint, replace(self.settings, false_alarm_rate=Settings.false_alarm_rate))
        state = checkpoint["state_dict"]
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        self.known_products = self.products = list(checkpoint[KEY]["products"])

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch of images.

        Raises:
            WTFlowError: If an image has more than 8 bits a channel, or its score or map is NaN or infinite.
        """
        del args, kwargs
        assert isinstance(batch.image, Tensor)
        paths = files_of(batch)
        raise_for_deep(paths)
        predictions = self.model(batch.image)
        raise_for_broken("score", paths, predictions.pred_score, predictions.anomaly_map)
        # anomalib's batches have no fields for these.
        batch.recognition = predictions.recognition  # type: ignore[attr-defined]
        batch.raw_score = predictions.pred_score  # type: ignore[attr-defined]
        return batch.update(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)

    test_step = predict_step = validation_step

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Score images as an export does: pre-processed, normalised and labelled."""
        result = super().forward(batch, *args, **kwargs)
        if isinstance(result, InferenceBatch):
            return result
        return InferenceBatch(result.pred_score, None, result.anomaly_map)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, which holds the backbone's weights: no hub or file is needed."""
        return super().load_from_checkpoint(
            *args, **{"pre_trained": False, "weights": None, "start_from": None, **kwargs}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the version, the settings, the products and the marks of images."""
        super().on_save_checkpoint(checkpoint)
        # A post-processor is a callback too, whose state Lightning would restore over a changed threshold.
        checkpoint.get("callbacks", {}).pop(getattr(self.post_processor, "state_key", None), None)
        checkpoint[KEY] = {
            "version": __version__,
            "settings": self._settings_in_force.plain(),
            "products": self.products,
            "marks": self.marks,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or version, or with NaN; take over its products.

        Raises:
            WTFlowError: If it is refused.
        """
        raise_for_content(checkpoint)
        raise_for_settings(checkpoint, self._settings_in_force)
        self.products, self.marks = checkpoint[KEY]["products"], checkpoint[KEY]["marks"]
        super().on_load_checkpoint(checkpoint)

    @property
    def _settings_in_force(self) -> Settings:
        """Return the settings, with the false-alarm rate of the user's own post-processor."""
        rate = getattr(self.post_processor, "false_alarm_rate", self.settings.false_alarm_rate)
        return replace(self.settings, false_alarm_rate=rate)
