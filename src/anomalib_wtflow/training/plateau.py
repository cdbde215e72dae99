"""When a training has learnt what there is to learn."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from anomalib_wtflow.flow.regression import matching_loss
from anomalib_wtflow.training.feature_caching import FeatureCaching
from anomalib_wtflow.training.seeding import PLATEAU, generator_for

DRAWS = 1
"""Draws of positions, times and noise for each image; the same in every epoch."""


class Plateau(Callback):
    """Stop when the matching loss of the averaged weights has fallen by too little in the last half of the epochs.

    ``L(e) > (1 - tolerance) L(e / 2)`` in epoch e, L being the loss on some training images at the same positions,
    times and noise each time (ours). No label, no test image and no calibration image takes part, so thresholds keep
    their promise; cached features are enough.

    Args:
        caching: Holds the features of some training images.
        tolerance: 0 to train for all epochs.
    """

    def __init__(self, caching: FeatureCaching, tolerance: float) -> None:
        self.caching, self.tolerance = caching, tolerance
        self.losses: list[float] = []
        self.message = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the losses so far, for a training that is resumed."""
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the losses of a checkpoint."""
        self.losses = list(state_dict["losses"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the loss, and stop if it has stopped falling."""
        if not self.tolerance:
            return
        self.losses.append(self._loss(trainer, pl_module))
        epochs = len(self.losses)
        if epochs < 2:
            return
        before, now = self.losses[epochs // 2 - 1], self.losses[-1]
        if now > (1 - self.tolerance) * before:
            trainer.should_stop = True
            self.message = (
                f"Stopped after {epochs} epochs: the loss fell from {before:.3f} in epoch {epochs // 2} to {now:.3f}, "
                f"by less than {self.tolerance:.0%}."
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say why it stopped."""
        del trainer, pl_module
        if self.message:
            rank_zero_info(self.message)

    @torch.no_grad()
    def _loss(self, trainer: Trainer, model: Any) -> float:
        reference = self.caching.reference
        total = torch.zeros(2, device=model.device)
        with model.evaluating():
            for part in reference.split(16) if len(reference) else ():
                x0 = part.to(model.device)
                for draw in range(DRAWS):
                    generator = generator_for(model.settings.seed, PLATEAU, draw, trainer.global_rank, x0.device)
                    loss = matching_loss(*model.model.regress(x0, generator, averaged=True))
                    total += torch.stack([loss * len(x0), loss.new_tensor(len(x0))])
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="sum")
        return float(total[0] / total[1])
