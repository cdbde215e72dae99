"""Scores while training, as the model gives them afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_wtflow.settings import Settings
from anomalib_wtflow.torch_model import NormalisedFeatures, Predictions


class Scoring:
    """Mixin: score features in the middle of a training, and stop it if scores or loss are not finite."""

    model: Any
    settings: Settings
    trainer: Any
    device: torch.device
    current_epoch: int

    @torch.no_grad()
    def score_features(self, features: NormalisedFeatures, image_size: tuple[int, int]) -> Predictions:
        """Score normalised features of images of ``image_size`` pixels as the model does by now."""
        x0, product, strangeness = (values.to(self.device) for values in features)
        with self.evaluating():
            return self._finite(self.model.score(x0, image_size, product, strangeness))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate in training, with its precision; only the field knows the two modes."""
        field = self.model.flow_field
        training = field.training
        field.eval()
        try:
            with self.trainer.precision_plugin.val_step_context():
                yield
        finally:
            field.train(training)

    def _finite(self, predictions: Predictions) -> Predictions:
        if self.trainer.state.fn == TrainerFn.FITTING and not predictions.pred_score.isfinite().all():
            self._stop(f"The scores became NaN or infinite in epoch {self.current_epoch}")
        return predictions

    def _stop(self, what: str) -> None:
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        where = f"the last checkpoint with finite scores is {saved}" if saved else "there is no checkpoint yet"
        msg = f"{what}: lower learning_rate (now {self.settings.learning_rate}); {where}."
        raise RuntimeError(msg)
