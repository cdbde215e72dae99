"""Image files: checks, marks that identify them, and the choice of threshold images."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import LabelName
from PIL import Image
from torch import Tensor

from anomalib_wtflow.conformal import images_needed
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.finite import finite

DEEP_MODES = "IF"
"""First letters of PIL's modes of more than 8 bits a channel."""
SAMPLE = 4096
"""Bytes of a file that its mark reads, from the middle."""


def mark_of(path: str | Path) -> int:
    """Return ``2^32 size + crc32(name, bytes in the middle)``, which identifies an image.

    Folders do not count, so that data may be moved.
    """
    with Path(path).open("rb") as file:
        size = Path(path).stat().st_size
        file.seek(max(0, size - SAMPLE) // 2)
        sample = zlib.crc32(file.read(SAMPLE), zlib.crc32(Path(path).name.encode(errors="surrogateescape")))
    return (size % 2**31 << 32) + sample


def marks_of(paths: Sequence[str]) -> Tensor:
    """Return :func:`mark_of` each file that exists, ``(n,)`` int64, sorted."""
    return torch.tensor(sorted(mark_of(path) for path in paths if Path(path).is_file()), dtype=torch.int64)


def files_of(batch: Any, prefix: str = "image") -> list[str]:
    """Return the files of a batch's images, or numbered names that begin with ``prefix``."""
    return list(getattr(batch, "image_path", None) or (f"{prefix} {k}" for k in range(len(batch.image))))


def threshold_images(
    trainer: Any, training: Mapping[str, str], rate: float | None, ratio: float
) -> tuple[set[str], set[str]]:
    """Choose the images that the threshold comes from.

    Good validation images that are neither trained nor tested on. Where those are too few of a product for the rate, a
    share of the training images too.

    Args:
        trainer: The trainer.
        training: Files of the training images, with their products.
        rate: False-alarm rate; None for anomalib's threshold, which takes the validation set.
        ratio: Share of the training images that is held out.

    Returns:
        The files of training images to hold out, and of validation images.
    """
    if rate is None:
        return set(), set()
    good = good_validation_images(trainer, training)
    counts = Counter(good.values())
    if all(counts[name] >= images_needed(rate) for name in set(training.values())):
        return set(), set(good)
    held = hold_out(list(training.values()), ratio)
    return {path for path, is_held in zip(training, held.tolist(), strict=True) if is_held}, set(good)


def hold_out(products: Sequence[str], ratio: float, seed: int = 0) -> Tensor:
    """Draw a share of the images of each product, at least one, as a mask ``(M,)``.

    Args:
        products: Product of each image.
        ratio: Share in (0, 1).
        seed: Seed of the draw: not the model's, so that trainings with different seeds hold the same images out.

    Raises:
        WTFlowError: If none would be left of a product.
    """
    held = torch.zeros(len(products), dtype=torch.bool)
    for name in sorted(set(products)):
        own = torch.tensor([k for k, product in enumerate(products) if product == name])
        count = max(1, round(ratio * len(own)))
        if count >= len(own):
            msg = (
                f"The product '{name}' has {len(own)} normal training image: give at least 2, one to train on and one "
                "for the threshold, and 100 or more for a low false-alarm rate."
            )
            raise WTFlowError(msg)
        held[own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:count]]] = True
    return held


def good_validation_images(trainer: Any, training: Mapping[str, str]) -> dict[str, str]:
    """Return the good images of a fit's validation set; none if one is used elsewhere.

    Args:
        trainer: The trainer.
        training: Files of the training images, with their products; the first is that of images without one.
    """
    loaders = trainer.val_dataloaders if trainer.validating else []
    data = [loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])]
    test = getattr(getattr(getattr(trainer, "datamodule", None), "test_data", None), "samples", None)
    others = set(training) | (set() if test is None else set(test["image_path"]))
    good: dict[str, str] = {}
    otherwise = next(iter(training.values()))
    for samples in (getattr(each, "samples", None) for each in data):
        if samples is not None:
            normal = samples[samples["label_index"] == LabelName.NORMAL]
            good |= dict(zip(normal["image_path"], normal.get("product", [otherwise] * len(normal)), strict=True))
    return {} if others & set(good) else good


def raise_for_deep(paths: Sequence[str]) -> None:
    """Refuse images of more than 8 bits a channel, which anomalib would clip.

    Raises:
        WTFlowError: If there is one.
    """
    for path in paths:
        if Path(path).suffix.lower() in Image.registered_extensions() and Path(path).is_file():
            with Image.open(path) as image:
                mode = image.mode
            if mode[0] in DEEP_MODES:
                msg = (
                    f"'{path}' has more than 8 bits a channel (mode {mode}), which anomalib clips: convert all images "
                    "to 8 bits by the same factor."
                )
                raise WTFlowError(msg)


def raise_for_broken(what: str, paths: Sequence[str], *values: Tensor) -> None:
    """Refuse images with NaN or infinite values: they are neither normal nor anomalous.

    Raises:
        WTFlowError: If there is one.
    """
    broken = (~finite(*values)).nonzero().flatten().tolist()
    if broken:
        msg = f"The {what} of '{paths[broken[0]]}' has NaN or infinite values: replace the image or the model."
        raise WTFlowError(msg)
