"""A default number of epochs that anything the user tells the trainer beats."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn


class EpochDefault:
    """Mixin: train for ``self.max_epochs`` epochs where the trainer has no epoch, step or time limit.

    Lightning turns an unset limit into 1000 epochs as soon as a training starts, and ``trainer_arguments`` would
    override what the user set. The moment at which the trainer is attached to the model is the one that can tell the
    two apart.
    """

    max_epochs: int

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this model."""
        return LightningModule.trainer.fget(self)  # type: ignore[attr-defined]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.max_epochs is None and trainer.max_steps == -1 and not timed:
            trainer.fit_loop.max_epochs = self.max_epochs
