"""WT-Flow as an anomalib model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn, optim
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_wtflow._registration import register_model
from anomalib_wtflow.cli.errors import one_sentence, plain_errors
from anomalib_wtflow.cli.quiet import quiet_logs
from anomalib_wtflow.deploy.exports import Exports
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, get_data_config, get_image_size
from anomalib_wtflow.features.cache import FeatureBatch
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.loss import WTFlowLoss
from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.products import Recognition
from anomalib_wtflow.settings import ARGUMENTS, Settings, documented, get_overrides, get_settings
from anomalib_wtflow.torch_model import WTFlowModel
from anomalib_wtflow.training import callbacks
from anomalib_wtflow.training.checkpoints import Checkpoints
from anomalib_wtflow.training.epoch_default import EpochDefault
from anomalib_wtflow.training.product_set import ProductSet
from anomalib_wtflow.training.scoring import Scoring
from anomalib_wtflow.training.seeding import NOISE, generator_for


@register_model
@documented
class WTFlow(EpochDefault, ProductSet, Scoring, Checkpoints, Exports, AnomalibModule):
    """Time-reversed flow matching with worst transport (arXiv 2508.05461v3) on a frozen backbone.

    Where an argument that is None by default is left out, the recipe's value holds. Anything given to the trainer
    (``max_epochs``, ``max_steps``, ``max_time``) wins over ``max_epochs`` here.

    Args:
        recipe: Named settings to start from: ``default``, or ``paper`` for the authors' recipe.
        overrides: Any other setting by name, as ``--model.overrides.coupling independent``; the command
            ``anomalib-wtflow settings`` lists them with their meanings and defaults.
        pre_processor: As in anomalib; True for a resize to ``image_size`` and the backbone's own mean and deviation.
        post_processor: As in anomalib; True for :class:`anomalib_wtflow.post_processor.WTFlowPostProcessor`.
        evaluator: As in anomalib.
        visualizer: As in anomalib.

    Raises:
        ValueError: If a name is unknown or a number is out of range; the message lists what is valid.
        RuntimeError: If the backbone's weights cannot be fetched.
    """

    model: WTFlowModel
    loss: WTFlowLoss

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
        quiet_logs()
        plain_errors()
        with one_sentence():
            self.settings = get_settings(recipe, **{**get_overrides(overrides), **given})
            if pre_processor is True:
                pre_processor = self.configure_pre_processor(self.settings.image_size, self.settings.backbone)
            super().__init__(pre_processor, post_processor, evaluator, visualizer)
            self.max_epochs = self.settings.max_epochs
            self.model = WTFlowModel(self.settings)
            self.loss = WTFlowLoss()
            if self.settings.start_from is not None:
                self.start_from(self.settings.start_from)

    # Components ------------------------------------------------------------------------------------------------------

    @classmethod
    def configure_pre_processor(
        cls, image_size: int | tuple[int, int] | None = None, backbone: str = DEFAULT_BACKBONE
    ) -> PreProcessor:
        """Build the pre-processor: resize, then ``(x - mean) / std`` with the backbone's own mean and deviation.

        The resize is not antialiased: exported graphs cannot antialias, and where training could, the scores of good
        images larger than ``image_size`` would rise in production (by a fifth, on bottles of twice the size), and the
        false-alarm rate with them.

        Args:
            image_size: Side, or height and width, in pixels; None for the backbone's own.
            backbone: Name of the timm model that the statistics belong to.

        Raises:
            ValueError: If the backbone is unknown.
        """
        config = get_data_config(backbone)
        resize = Resize(get_image_size(backbone, image_size), antialias=False)
        return PreProcessor(transform=Compose([resize, Normalize(mean=config.mean, std=config.std)]))

    def configure_post_processor(self) -> PostProcessor:
        """Build the post-processor of the settings' false-alarm rate."""
        return WTFlowPostProcessor(self.settings.false_alarm_rate)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add WTFlow's callbacks to anomalib's components."""
        components = super().configure_callbacks()
        return [*(components if isinstance(components, Sequence) else [components]), *callbacks.of(self)]

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before training: there is nothing to validate until the normalisation is fitted."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images only."""
        return LearningType.ONE_CLASS

    # Steps -----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch | FeatureBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Regress the field on one batch.

        Raises:
            RuntimeError: If the loss is NaN or infinite.
        """
        del args, kwargs
        x0: Any
        if isinstance(batch, FeatureBatch):
            x0, product = batch.features, batch.product
        else:
            x0, product, _ = self.model.normalise(self.model.extract(batch.image))  # type: ignore[arg-type]
        # Batches, not optimiser steps: batches whose gradients are accumulated draw each for itself.
        place, rank = self.trainer.fit_loop.total_batch_idx, self.global_rank
        generator = generator_for(self.settings.seed, NOISE, place, rank, self.device)
        loss = self.loss(*self.model.regress(x0, generator, product=product))
        value = loss.item()
        if not math.isfinite(value):
            self._stop(f"The training loss became {value} in epoch {self.current_epoch}")
        self.log(
            "train_loss", value, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(x0), sync_dist=True
        )  # fmt: skip
        return {"loss": loss}

    def validation_step(self, batch: Batch | FeatureBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch of images, or of their features."""
        del args, kwargs
        predictions: Any = (
            self.model.score(batch.features, batch.image_size, batch.product, batch.strangeness)  # type: ignore[arg-type]
            if isinstance(batch, FeatureBatch)
            else self.model(batch.image)
        )
        # anomalib's batches have no fields for these.
        batch.recognition = Recognition(predictions.product, predictions.strangeness)  # type: ignore[union-attr]
        batch.raw_score = predictions.pred_score  # type: ignore[union-attr]
        self._finite(predictions, batch)
        return batch.update(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch of images."""
        return self.validation_step(batch, *args, **kwargs)

    def predict_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score one batch of images."""
        return self.validation_step(batch, *args, **kwargs)

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Score images as an export does: pre-processed, normalised and labelled.

        Raises:
            RuntimeError: If the model is in training mode, as after a training.
        """
        if self.training:
            msg = "The model is in training mode, in which it judges no images: call its eval() before."
            raise RuntimeError(msg)
        result = super().forward(batch, *args, **kwargs)
        return (
            result
            if isinstance(result, InferenceBatch)
            else InferenceBatch(result.pred_score, None, result.anomaly_map)
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW and its schedule for the field; the backbone is frozen."""
        s = self.settings
        # Fused, a training step takes 15 % less on two cores; Lightning then cannot clip under mixed precision.
        fused = self.device.type == "cpu" and not isinstance(self.trainer.precision_plugin, MixedPrecision)
        parameters = self.model.field.parameters()
        optimizer = optim.AdamW(parameters, lr=s.learning_rate, weight_decay=s.weight_decay, fused=fused or None)
        schedule = SCHEDULERS[s.scheduler](self.trainer.estimated_stepping_batches)
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
