"""The running average of the weights, which the model scores with."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class WeightAveraging(Callback):
    """Take the field's weights into the model's average after each optimiser step."""

    def __init__(self) -> None:
        self._averaged_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start anew, or from the step that a resumed training is at.

        A model that was trained before gets another normalisation, to which its old weights do not belong.
        """
        self._averaged_at = trainer.global_step
        averaged = pl_module.model.averaged
        if trainer.ckpt_path is None and averaged is not None:
            averaged.n_averaged.zero_()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Average, unless the batch's gradients wait for others'."""
        del args, kwargs
        if trainer.global_step != self._averaged_at:
            pl_module.model.average()
            self._averaged_at = trainer.global_step
