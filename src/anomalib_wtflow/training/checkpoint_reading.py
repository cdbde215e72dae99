"""Checkpoints that a trainer reads: WTFlow's rules come before Lightning's reading."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeGuard

from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_wtflow.training import checkpoint_rules
from anomalib_wtflow.training.giving_back import stand_in


def is_local(path: Any) -> TypeGuard[str | Path]:
    """Whether a checkpoint is named by a path of this machine, not by a URL, and is no open file."""
    return isinstance(path, str | Path) and "://" not in str(path)


def checked(load: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Have a way of reading checkpoints read what :func:`anomalib_wtflow.training.checkpoint_rules.read` admits.

    Args:
        load: Reads a checkpoint by its path, as a ``CheckpointIO`` does, and takes ``weights_only``.

    Returns:
        The same with the rules, which always reads plain values; it raises FileNotFoundError if there is no such file,
        and ValueError if it is not a checkpoint that this version can use.
    """

    @wraps(load)
    def read(path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        plain = {**kwargs, "weights_only": True}
        if not is_local(path):
            return load(path, *args, **plain)
        return checkpoint_rules.read(path, lambda path: load(path, *args, **plain))

    return read


class CheckpointReading(Callback):
    """Have the trainer read checkpoints by WTFlow's rules, for the time of a run.

    The trainer keeps its ``CheckpointIO``, which may be a user's own.
    """

    def __init__(self) -> None:
        self._give_back: Callable[[], None] = lambda: None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of the trainer's own reading, before it reads."""
        del pl_module, stage
        self._give_back = stand_in(trainer.strategy.checkpoint_io, "load_checkpoint", checked)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give it back."""
        del trainer, pl_module, stage
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back after a failure."""
        del trainer, pl_module, exception
        self._give_back()
