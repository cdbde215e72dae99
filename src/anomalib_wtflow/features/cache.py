"""Features of the frozen backbone, kept between the epochs, so that no image passes the backbone twice (ours)."""

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from anomalib.data import ImageBatch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from anomalib_wtflow.features.memory import available_memory

DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.Pad, v2.Normalize, v2.ToDtype, v2.ToImage, v2.Grayscale, v2.Identity)
"""Transforms that give the same image each time."""


def is_deterministic(transform: Any) -> bool:
    """Whether a torchvision transform, or None, is known to give the same image each time."""
    if transform is None:
        return True
    if isinstance(transform, v2.Compose):
        return all(is_deterministic(part) for part in transform.transforms)
    if isinstance(transform, nn.Sequential):
        return all(is_deterministic(part) for part in transform)
    return type(transform) in DETERMINISTIC


@dataclass(frozen=True)
class Share:
    """Processes of one machine that fill a store together, each a part of its own.

    Attributes:
        folder: Folder of the file that they map; None for one process alone.
        rank: Which of them this is.
        size: How many they are.
    """

    folder: Path | None = None
    rank: int = 0
    size: int = 1

    def part(self, count: int) -> range:
        """Return which of ``count`` items are this process's own."""
        each = -(-count // self.size)
        return range(min(count, self.rank * each), min(count, (self.rank + 1) * each))


class FeatureStore:
    """Rows for ``count`` images: in memory up to a budget, in a memory-mapped temporary file beyond it or if shared.

    So are those that would take more than half of the memory that is left (:mod:`anomalib_wtflow.features.memory`).

    Args:
        count: Number of images.
        budget: Bytes that may be held in memory.
        share: Which of the rows this process fills, and the folder of the file that all map.
        name: Name of the file.
        dtype: Type of the rows.
    """

    def __init__(
        self,
        count: int,
        budget: float,
        share: Share | None = None,
        name: str = "features",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count, self.budget, self.name, self.dtype = count, budget, name, dtype
        self.share = share or Share()
        self.part = self.share.part(count)
        self.filled = 0
        self.in_memory = False
        self.rows: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """What this process has filled so far, ``(M, C, H, W)``."""
        if self.rows is None:
            return torch.empty(0)
        return self.rows[self.part.start : self.part.start + self.filled]

    def append(self, features: Tensor) -> None:
        """Add features ``(N, C, H, W)`` to this process's part.

        Raises:
            ValueError: If there is no room for them, or they are of another size than those before.
        """
        shape = (self.count, *features.shape[1:])
        if self.rows is None:
            self.open(shape)
        rows: Any = self.rows
        if rows.shape != shape or self.filled + len(features) > len(self.part):
            msg = (
                f"{len(features)} features of size {tuple(features.shape[1:])} do not fit behind {self.filled} of "
                f"{len(self.part)} of size {tuple(rows.shape[1:])}: give images of one size, as many as announced."
            )
            raise ValueError(msg)
        start = self.part.start + self.filled
        rows[start : start + len(features)] = features.detach()
        self.filled += len(features)

    def open(self, shape: Sequence[int]) -> None:
        """Make room for rows of ``shape``, which starts with their number; shared ones are in the file of all.

        Raises:
            ValueError: If the folder for temporary files takes no file of that size.
        """
        shape = torch.Size(shape)
        size = shape.numel() * self.dtype.itemsize
        if self.share.folder is None and size <= min(self.budget, available_memory() / 2):
            self.rows, self.in_memory = torch.empty(shape, dtype=self.dtype), True
            return
        parent = temporary_folder()
        try:
            with self.made(parent) as file:
                memory = mapped(file.fileno(), parent, size)
        except OSError as error:
            msg = (
                f"The feature cache needs {size / 1e9:.3g} GB in {parent} ({error.strerror}): set TMPDIR to a folder "
                "with more room, lower image_size, or set feature_cache to 0 for no cache."
            )
            raise ValueError(msg) from error
        self.rows = torch.frombuffer(memory, dtype=self.dtype, count=shape.numel()).view(shape)

    def made(self, parent: Path) -> IO[bytes]:
        """Make the file: one that has no name, so that nothing is left of it whatever happens, unless others map it."""
        if self.share.folder is None:
            return TemporaryFile(prefix="wtflow-features-", dir=parent)
        return open(self.share.folder / self.name, "ab+", opener=partial(os.open, mode=0o600))

    def unlink(self) -> None:
        """Take the file's name away once all who share it have it mapped: whatever ends them, nothing is left of it."""
        if self.share.folder and os.name == "posix":  # elsewhere a mapped file keeps its name
            (self.share.folder / self.name).unlink(missing_ok=True)


def temporary_folder() -> Path:
    """Return the folder for temporary files.

    Raises:
        ValueError: If no folder can be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        msg = (
            f"The feature cache needs a folder for temporary files ({error.strerror}): set TMPDIR to one that can be "
            "written to, or set feature_cache to 0 for no cache."
        )
        raise ValueError(msg) from error


def mapped(descriptor: int, folder: Path, size: int) -> mmap.mmap:
    """Map an open file into memory once it has a size: one that the disk has no room for would end the process.

    Raises:
        OSError: If there is no room.
    """
    size = max(size, 1)  # nothing cannot be mapped
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", errno.EOPNOTSUPP) not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # A system without that can only be asked how much room there is by now.
        present = os.fstat(descriptor).st_size
        if size > present + disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if size > present:
            os.ftruncate(descriptor, size)
    return mmap.mmap(descriptor, size)


@dataclass
class FeatureBatch(ImageBatch):
    """A batch of normalised features in the place of images, with the truth about the images where that is asked for.

    Attributes:
        features: ``(N, C, H, W)``.
        image_size: Height and width of the images, as the model saw them.
        product: Places of the products that they were recognised as, ``(N,)``.
        strangeness: How unlike all products they are, ``(N,)``.
    """

    features: Tensor | None = None
    image_size: tuple[int, int] | None = None
    product: Tensor | None = None
    strangeness: Tensor | None = None

    @staticmethod
    def validate_image(image: None) -> None:  # type: ignore[override]
        """Accept that there is no image."""
        del image

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return 0 if self.features is None else len(self.features)


class FeatureDataset(Dataset):
    """Normalised features of an anomalib data set's images; anything else that is asked of it, the data set answers.

    Args:
        data: The data set of images.
        truth: Whether batches say what is known of the images: labels, masks and paths.
    """

    def __init__(self, data: Any, truth: bool = False) -> None:
        self.data, self.truth = data, truth
        self.store: FeatureStore | None = None
        self.recognised: FeatureStore | None = None
        self.masks: FeatureStore | None = None
        self.image_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        """Ask the data set of images."""
        if name == "data":  # while an instance is being copied or unpickled, there is none yet
            raise AttributeError(name)
        return getattr(self.data, name)

    def __getitem__(self, index: int) -> FeatureBatch:
        """Return a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> FeatureBatch:
        """Return a batch.

        Raises:
            RuntimeError: If no features were put in yet.
        """
        if self.store is None or self.store.rows is None or self.recognised is None:
            msg = "There are no features yet: they are extracted when a training starts."
            raise RuntimeError(msg)
        product, strangeness = self.recognition(indices)
        batch = FeatureBatch(
            image=None,
            features=self.store.rows[indices],
            image_size=self.image_size,
            product=product,
            strangeness=strangeness,
        )
        if self.truth:
            samples = self.data.samples.iloc[indices]
            batch.gt_label = torch.tensor(samples["label_index"].to_numpy(dtype=int))
            batch.image_path = samples["image_path"].tolist()
            if self.masks is not None and self.masks.rows is not None:
                batch.gt_mask = Mask(self.masks.rows[indices])
        return batch

    def recognition(self, indices: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the places of the images' products and how unlike all products they are, ``(N,)`` each."""
        rows: Any = self.recognised.rows  # type: ignore[union-attr]
        return rows[indices, 0].long(), rows[indices, 1]

    @staticmethod
    def collate_fn(batch: FeatureBatch) -> FeatureBatch:
        """Return what :meth:`__getitems__` gave, which is a batch already."""
        return batch
