"""Whether a training goes on with the images that its checkpoint was trained on."""

import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from anomalib_wtflow.reporting.data_sets import image_paths

SAMPLE = 4096
"""Bytes of a file that are read, from its middle: images of the same name and size can be others (BMP, TIFF)."""


def mark_of(path: Path) -> int:
    """Return a number for a file: ``2^32 size + crc32(name, bytes in the middle)``.

    Folders do not count, so that data may be moved.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(max(0, size - SAMPLE) // 2)
        sample = zlib.crc32(file.read(SAMPLE), zlib.crc32(path.name.encode(errors="surrogateescape")))
    return (size % 2**31 << 32) + sample


def marks_of(paths: Iterable[str]) -> Tensor:
    """Return :func:`mark_of` each file, ``(n,)`` int64, sorted."""
    return torch.tensor(sorted(mark_of(Path(path)) for path in paths), dtype=torch.int64)


def difference(before: Tensor, now: Tensor) -> str | None:
    """Say how a checkpoint's training images differ from those at hand, both as :func:`marks_of`; None if not."""
    old, new = Counter(before.tolist()), Counter(now.tolist())
    added, gone = (new - old).total(), (old - new).total()
    if not added and not gone:
        return None
    return (
        f"The training goes on with other images than the checkpoint was trained on: it had {len(before)}, here are "
        f"{len(now)}, {added} of which it had not, and {gone} of its own are gone. What it has learnt of those, the "
        "normalisation too, stays: give it the same images (and the same --data.seed), train anew without --ckpt_path, "
        "or add products with --model.start_from."
    )


class SameData(Callback):
    """Have a checkpoint know its training images, and warn if its training goes on with others."""

    def __init__(self) -> None:
        self._paths: list[str] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """List the training images, those for the threshold included, before others take them out."""
        del pl_module
        if stage == "fit":
            self._paths = image_paths(getattr(getattr(trainer, "datamodule", None), "train_data", None), masks=False)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare them with those of the checkpoint, which has been read by now, and take their place."""
        marks = marks_of(self._paths) if self._paths else None
        if trainer.ckpt_path is not None and marks is not None and pl_module.trained_on is not None:
            text = difference(pl_module.trained_on, marks)
            if text:
                rank_zero_warn(text)
        pl_module.trained_on = marks
