"""Checkpoints that a trainer reads: WTFlow's rules come before Lightning's reading."""

from pathlib import Path
from typing import Any, TypeGuard

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import CheckpointIO

from anomalib_wtflow.training import checkpoint_rules


def is_local(path: Any) -> TypeGuard[str | Path]:
    """Whether a checkpoint is named by a path of this machine, not by a URL, and is no open file."""
    return isinstance(path, str | Path) and "://" not in str(path)


class CheckedReading(CheckpointIO):
    """Another ``CheckpointIO`` that reads what :func:`anomalib_wtflow.training.checkpoint_rules.read` admits.

    Args:
        io: Writes, removes and reads, always as plain values.
    """

    def __init__(self, io: CheckpointIO) -> None:
        self.io = io

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint that this version can use.
        """
        plain = {**kwargs, "weights_only": True}
        if not is_local(path):
            return self.io.load_checkpoint(path, *args, **plain)
        return checkpoint_rules.read(path, lambda path: self.io.load_checkpoint(path, *args, **plain))

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint."""
        self.io.save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        self.io.remove_checkpoint(path)

    def teardown(self) -> None:
        """End what the other one has begun."""
        self.io.teardown()


class CheckpointReading(Callback):
    """Have the trainer read checkpoints by :class:`CheckedReading`, for the time of a run."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of the trainer's own reading, before it reads."""
        del pl_module, stage
        trainer.strategy.checkpoint_io = CheckedReading(trainer.strategy.checkpoint_io)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back."""
        del pl_module, stage
        self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back after a failure."""
        del pl_module, exception
        self._give_back(trainer)

    @staticmethod
    def _give_back(trainer: Trainer) -> None:
        if isinstance(trainer.strategy.checkpoint_io, CheckedReading):
            trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io.io
