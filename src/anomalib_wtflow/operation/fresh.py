"""Which images a threshold may come from: those that the model was not trained on, and each once."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from anomalib_wtflow.training.same_data import mark_of


class Sorted(NamedTuple):
    """Places of images in their list: to be used; which the model was trained on; copies of one before them."""

    fresh: list[int]
    trained_on: list[int]
    copies: list[int]


def fresh_ones(paths: Sequence[str | Path], trained_on: Tensor | None) -> Sorted:
    """Sort images by what their scores promise of the next good part.

    A score of an image that the field was trained on is lower than that of the next one, and a copy says nothing new:
    a threshold from either has a higher false-alarm rate than it promises. Files are known again by name, size and
    bytes in the middle (:func:`anomalib_wtflow.training.same_data.mark_of`), copies by all their bytes.

    Args:
        paths: The files.
        trained_on: Marks of the model's training images; None if they are not known.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If no image is left.
    """
    known = set() if trained_on is None else set(trained_on.tolist())
    seen: set[bytes] = set()
    places = Sorted([], [], [])
    for place, path in enumerate(map(Path, paths)):
        content = sha256(path.read_bytes()).digest()
        kind = places.trained_on if mark_of(path) in known else places.copies if content in seen else places.fresh
        kind.append(place)
        seen.add(content)
    if not places.fresh:
        msg = (
            f"All {len(paths)} images are among those that the model was trained with, whose scores promise nothing "
            "for new parts: give good images that it has not seen."
        )
        raise ValueError(msg)
    return places
