"""Scores while training, as the model gives them afterwards, and what is said of those that are not finite."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from anomalib.data import Batch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_wtflow.flow.finite import broken, finite
from anomalib_wtflow.post_processor import image_name, no_verdict
from anomalib_wtflow.settings import Settings
from anomalib_wtflow.torch_model import NormalisedFeatures, Predictions


class Scoring:
    """Mixin: score features in the middle of a training; no step passes scores on that are NaN or infinite."""

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

    def _finite(self, predictions: Predictions, batch: Batch | None = None) -> Predictions:
        if self.trainer.state.fn != TrainerFn.FITTING:
            assert batch is not None
            self.raise_for_broken(predictions, batch.image, batch.image_path)  # type: ignore[arg-type, attr-defined]
        elif not finite(predictions.pred_score, predictions.anomaly_map).all():
            self._stop(f"The scores became NaN or infinite in epoch {self.current_epoch}")
        return predictions

    def raise_for_broken(self, predictions: Any, images: Tensor, paths: Sequence[str] | None) -> None:
        """Say of which image, and at which stage first, something is NaN or infinite.

        Args:
            predictions: What the model made of the images: ``pred_score``, ``(N,)``, and ``anomaly_map``.
            images: The images, pre-processed, ``(N, 3, H, W)``.
            paths: Their files; None if they have none.

        Raises:
            ValueError: If there is such an image.
        """
        places = broken(predictions.pred_score, predictions.anomaly_map)
        if places:
            first = places[0]
            stages = self.model.stages(images[first : first + 1])
            what = next((name for name, values in stages if not finite(values).all()), "scores")
            raise ValueError(no_verdict(f"The {what} of {image_name(paths, first)} are", len(places)))

    def raise_for_broken_weights(self) -> None:
        """Refuse a model that an activation could hide the brokenness of.

        Raises:
            ValueError: If a weight or a statistic is NaN or infinite.
        """
        name = self.model.broken_tensor()
        if name is not None:
            msg = f"'{name}' of the model is NaN or infinite: load another checkpoint, or train the model again."
            raise ValueError(msg)

    def on_validation_start(self) -> None:
        """Refuse broken weights; in the middle of a training it is the scores that tell."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.raise_for_broken_weights()

    def on_test_start(self) -> None:
        """Refuse broken weights."""
        self.raise_for_broken_weights()

    def on_predict_start(self) -> None:
        """Refuse broken weights."""
        self.raise_for_broken_weights()

    def _stop(self, what: str) -> None:
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        where = f"the last checkpoint with finite scores is {saved}" if saved else "there is no checkpoint yet"
        msg = f"{what}: lower learning_rate (now {self.settings.learning_rate}); {where}."
        raise RuntimeError(msg)
