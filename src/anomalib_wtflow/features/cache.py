"""Features of the frozen backbone, kept between the epochs, so that no image passes the backbone twice (ours)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

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


class FeatureStore:
    """Features of ``count`` images: in memory up to a budget, in a memory-mapped temporary file beyond it.

    Args:
        count: Number of images.
        budget: Bytes that may be held in memory.
    """

    def __init__(self, count: int, budget: float) -> None:
        self.count, self.budget = count, budget
        self.filled = 0
        self.folder: TemporaryDirectory | None = None
        self.rows: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """The features so far, ``(M, C, H, W)``."""
        return torch.empty(0) if self.rows is None else self.rows[: self.filled]

    def append(self, features: Tensor) -> None:
        """Add features ``(N, C, H, W)``, as float32.

        Raises:
            ValueError: If there is no room for them, or they are of another size than those before.
        """
        shape = (self.count, *features.shape[1:])
        if self.rows is None:
            self.rows = self._allocate(torch.Size(shape))
        if self.rows.shape != shape or self.filled + len(features) > self.count:
            msg = (
                f"{len(features)} features of size {tuple(features.shape[1:])} do not fit behind {self.filled} of "
                f"{self.count} of size {tuple(self.rows.shape[1:])}: give images of one size, as many as announced."
            )
            raise ValueError(msg)
        self.rows[self.filled : self.filled + len(features)] = features.detach()
        self.filled += len(features)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the features by ``function`` of them, which keeps their shape, a few images at a time."""
        for part in self.features.split(16):
            part.copy_(function(part))

    def _allocate(self, shape: torch.Size) -> Tensor:
        if 4 * shape.numel() <= self.budget:
            return torch.empty(shape)
        self.folder = TemporaryDirectory(prefix="wtflow-features-", ignore_cleanup_errors=True)
        file = Path(self.folder.name) / "features.f32"
        return torch.from_file(str(file), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)


@dataclass
class FeatureBatch:
    """Normalised features in the place of a batch of images, which pre-processors leave alone.

    Attributes:
        features: ``(N, C, H, W)``.
        image: None.
        gt_mask: None.
    """

    features: Tensor
    image: Tensor | None = None
    gt_mask: Tensor | None = None


class FeatureLoader:
    """Batches of features, in a new random order each time.

    Args:
        features: ``(M, C, H, W)``.
        batch_size: Features a batch.
        shuffle: Whether the order is random.
        drop_last: Whether an incomplete last batch is left out.
    """

    def __init__(self, features: Tensor, batch_size: int, shuffle: bool = True, drop_last: bool = False) -> None:
        self.features, self.batch_size = features, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last

    def __len__(self) -> int:
        """Return the number of batches."""
        whole, rest = divmod(len(self.features), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Yield the batches."""
        count = len(self.features)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for indices in order.split(self.batch_size)[: len(self)]:
            yield FeatureBatch(self.features[indices])
