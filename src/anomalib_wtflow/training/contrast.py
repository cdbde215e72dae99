"""Slope and limit of the contrast, which go with the weights."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_wtflow.training.feature_caching import FeatureCaching, over_processes


class Contrast(Callback):
    """Set slope and limit of the contrast from training images, before anything is scored or saved with new weights.

    Args:
        caching: Holds the features of some training images.
    """

    def __init__(self, caching: FeatureCaching) -> None:
        self.caching = caching
        self._observed_at = -1

    def observe(self, trainer: Trainer, model: Any) -> None:
        """Set them for the present weights, while training; once a step."""
        if trainer.state.fn != TrainerFn.FITTING or self._observed_at == trainer.global_step:
            return
        with model.evaluating():
            x0, product, _ = (values.to(model.device) for values in self.caching.reference)
            size = self.caching.image_size
            model.model.observe(x0, size, product, over_processes(trainer, model))
        self._observed_at = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it before validation images are scored."""
        self.observe(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it before a checkpoint of the epoch is written."""
        self.observe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it for the final weights."""
        self.observe(trainer, pl_module)
