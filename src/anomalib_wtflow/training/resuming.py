"""A training that is stopped, and one that goes on from a checkpoint: nothing is lost between the two."""

import signal
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomalib_wtflow.training.giving_back import stand_in
from anomalib_wtflow.writing import one_sentence_for, replace_whole


def whole(save: Callable[..., None]) -> Callable[..., None]:
    """Write checkpoints beside their place and rename them: at any moment the old or the new one is there, and whole.

    Lightning's own way writes to the folder for temporary files and moves the file from there. If that is another
    disk, moving is copying, and a process that is killed or a disk that is full meanwhile leaves half a checkpoint in
    the place of the last whole one.

    Args:
        save: Lightning's own way, which remains that for a remote place.

    Returns:
        A way that raises RuntimeError if the disk is full or the folder cannot be written to.
    """

    @wraps(save)
    def write(checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            save(checkpoint, path, storage_options)
            return
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer())

    return write


def write_whole_from_now_on(io: CheckpointIO) -> None:
    """Have a ``CheckpointIO`` that writes as Lightning does write by :func:`whole`, until it is torn down.

    That is at the end of a run, also of one that fails, when callbacks have written their last checkpoints.
    """
    if getattr(io.save_checkpoint, "__func__", None) is not TorchCheckpointIO.save_checkpoint:
        return
    gives_back = [stand_in(io, "save_checkpoint", whole)]

    def ending(teardown: Callable[[], None]) -> Callable[[], None]:
        def end() -> None:
            for give_back in gives_back:
                give_back()
            teardown()

        return end

    gives_back.append(stand_in(io, "teardown", ending))


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a checkpoint of a training by :func:`replace_whole`.

    Raises:
        RuntimeError: If the disk is full or the folder cannot be written to.
    """
    last = f"the last whole one is {path}" if path.is_file() else "there is none yet"
    way = f"make room there, or give --default_root_dir another folder; {last}"
    with one_sentence_for("A checkpoint", path.parent, way):
        replace_whole(path, content)


def written_by(trainer: Trainer) -> dict[str, int]:
    """Find the files that a trainer's callbacks know of and a training can go on from, with their file times.

    Those of an earlier run, which a resumed one is told of, are among them. A remote file has the time 0: nobody knows.
    """
    paths: list[str] = []
    for writer in trainer.checkpoint_callbacks:
        if isinstance(writer, ModelCheckpoint) and not writer.save_weights_only:
            paths += [*writer.best_k_models, writer.last_model_path, writer.best_model_path]
    return {path: time for path in paths if (time := time_of(path)) is not None}


def time_of(path: str | Path) -> int | None:
    """Return the file time of a checkpoint, 0 of a remote one, None of one that is not there."""
    if "://" in str(path):
        return 0
    return Path(path).stat().st_mtime_ns if path and Path(path).exists() else None


def newest_checkpoint(trainer: Trainer, before: dict[str, int]) -> str | None:
    """Find the file from which a training can go on: the newest that it wrote, or else the one that it began with.

    File times are compared among its own files alone: the one that it began with may be of another machine's clock.

    Args:
        trainer: The trainer of the training.
        before: What :func:`written_by` found when it began.
    """
    known, began = written_by(trainer), trainer.ckpt_path
    own = {path: time for path, time in known.items() if before.get(path) != time}
    if not own and began is not None and time_of(began) is not None:
        return str(began)
    return max(own or known, key=known.__getitem__, default=None)


class Resuming(Callback):
    """Keep checkpoints whole, say how a stopped training goes on, and hand on a checkpoint with nothing left to do."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write whole checkpoints, unless the user brings a way of writing them."""
        del pl_module
        if stage == "fit":
            write_whole_from_now_on(trainer.strategy.checkpoint_io)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that is beyond the last epoch of this training, before Lightning does.

        Raises:
            ValueError: If it is.
        """
        del pl_module
        epoch, last = checkpoint["epoch"], trainer.max_epochs
        if trainer.state.fn == TrainerFn.FITTING and last is not None and -1 < last < epoch:
            msg = (
                f"'{trainer.ckpt_path}' is in epoch {epoch} (of which the first is 0), but max_epochs is {last}: give "
                f"{epoch + 1} or more to go on, or leave --ckpt_path out to train anew."
            )
            raise ValueError(msg)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at what is there before this training writes anything."""
        del pl_module
        self._before = written_by(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Copy the checkpoint to where the model is expected, if its training had ended already."""
        writer: Any = trainer.checkpoint_callback
        if trainer.ckpt_path is None or not isinstance(writer, ModelCheckpoint) or not writer.dirpath:
            return
        source, folder = Path(trainer.ckpt_path), Path(writer.dirpath)
        if trainer.global_step != pl_module.trained_steps or source.parent == folder or not source.is_file():
            return
        name = source.stem if writer.filename is None or "{" in writer.filename else writer.filename
        target = folder / f"{name}{writer.FILE_EXTENSION}"
        writer.best_model_path = str(target)
        if trainer.is_global_zero:
            write_whole(target, source.read_bytes())
        rank_zero_info(f"The training of {source} had ended, so nothing was left to train: {target} is a copy of it.")

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Say where the last checkpoint is, if a person or a machine stopped the training."""
        del pl_module
        if isinstance(exception, SIGTERMException):  # Lightning would end with 0, as if all had ended well
            exception.code = 128 + signal.SIGTERM
        if trainer.state.fn != TrainerFn.FITTING or not isinstance(exception, KeyboardInterrupt | SIGTERMException):
            return
        saved = newest_checkpoint(trainer, self._before)
        way = f"give the same command --ckpt_path {saved} to go on" if saved else "there is no checkpoint to go on from"
        rank_zero_info(f"Stopped in epoch {trainer.current_epoch}: {way}.")
