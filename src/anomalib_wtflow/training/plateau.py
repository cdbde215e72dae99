"""When a training has learnt what there is to learn."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from anomalib_wtflow.flow.regression import matching_loss
from anomalib_wtflow.settings import option
from anomalib_wtflow.training.feature_caching import FeatureCaching
from anomalib_wtflow.training.seeding import PLATEAU, generator_for

FIRST = 20
"""The first epoch that may be the last: before, the average is not yet one of many steps."""


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

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Train no further if the checkpoint to go on from was that of the last epoch."""
        del pl_module
        if self.tolerance and trainer.ckpt_path is not None:
            self._stop_if_settled(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the loss, and stop if it has stopped falling."""
        if not self.tolerance:
            return
        self.losses.append(self._loss(trainer, pl_module))
        self._stop_if_settled(trainer)

    def _stop_if_settled(self, trainer: Trainer) -> None:
        least = getattr(trainer, "min_epochs", None) or 0
        self.message = ""
        if len(self.losses) >= least and has_settled(self.losses, self.tolerance):
            trainer.should_stop = True
            half = len(self.losses) // 2
            self.message = (
                f"Stopped after {len(self.losses)} epochs: since epoch {half} the matching loss changed by "
                f"{self.losses[-1] / self.losses[half - 1] - 1:+.1%}, and {option('plateau')} asks for a fall of at "
                f"least {100 * self.tolerance:.3g}%."
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say why it stopped."""
        del trainer, pl_module
        if self.message:
            rank_zero_info(self.message)

    def _loss(self, trainer: Trainer, model: Any) -> float:
        x0, product, _ = (values.to(model.device) for values in self.caching.reference)
        with model.evaluating():
            loss = matching_loss_of(model.model, x0, product, trainer.global_rank) if len(x0) else 0.0
        if trainer.world_size == 1:
            return loss
        total = torch.tensor([loss * len(x0), len(x0)], dtype=torch.float64, device=model.device)
        total = trainer.strategy.reduce(total, reduce_op="sum")
        return float(total[0] / total[1])


def has_settled(losses: Sequence[float], tolerance: float) -> bool:
    """Whether ``L(e) > (1 - tolerance) L(e / 2)``, e being the last epoch; False before epoch 20."""
    return len(losses) >= FIRST and losses[-1] > (1 - tolerance) * losses[len(losses) // 2 - 1]


@torch.no_grad()
def matching_loss_of(model: Any, x0: Tensor, product: Tensor | None = None, rank: int = 0) -> float:
    """Return the averaged field's matching loss on normalised features ``(N, C, H, W)`` of products ``(N,)``.

    Positions, times and noise depend on the model's seed and the rank alone.
    """
    generator = generator_for(model.settings.seed, PLATEAU, 0, rank, x0.device)
    total = 0.0
    for indices in torch.arange(len(x0)).split(32):
        own = None if product is None else product[indices]
        total += len(indices) * float(matching_loss(*model.regress(x0[indices], generator, product=own, averaged=True)))
    return total / len(x0)
