"""The test images for the page: what is said of each, and its picture beside its map."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import binary_erosion

from anomalib_wtflow.diagnosis.score_numbers import thresholds_of
from anomalib_wtflow.diagnosis.scoring import ScoredImage, informative_first
from anomalib_wtflow.lightning_model import WTFlow

SIDE = 480
"""Longest side of a picture, in pixels."""
BYTES = 9_000_000
"""How much the pictures of a page may take, before base64 makes a third more of it."""
QUALITY = 85
CALLED, MARKED = (255, 255, 255), (0, 230, 118)
"""Colours of the outlines: what the model marks, and what the mask of the data says."""


class Entry(NamedTuple):
    """An image of the gallery: what the JSON says of it, and JPEGs of the image and of its map."""

    row: dict[str, Any]
    picture: bytes
    heat: bytes


def ranked_images(model: WTFlow, images: Sequence[ScoredImage]) -> list[ScoredImage]:
    """Sort the images, the most informative first."""
    places = range(len(model.product_names))
    return informative_first(images, [thresholds_of(model, place)[0] for place in places])


def rows(model: WTFlow, images: Sequence[ScoredImage]) -> list[dict[str, Any]]:
    """Say what the model made of each image, for the JSON."""
    return [
        {
            "file": "/".join(image.path.replace("\\", "/").split("/")[-2:]),
            "kind": image.shown_kind,
            "product": model.product_names[int(image.product)],
            "recognised": image.recognised,
            "verdict": image.verdict,
            "score": image.score,
            "threshold": thresholds_of(model, int(image.product))[0],
        }
        for image in images
    ]


def entries(model: WTFlow, told: Iterable[tuple[ScoredImage, dict[str, Any]]]) -> Iterator[Entry]:
    """Draw images in order, until they take what a page can bear.

    Maps are on a scale that ends at twice the pixel threshold of the product; without one, at the map's own maximum.

    Args:
        model: The trained model.
        told: Images and their :func:`rows`.
    """
    used = 0
    for image, row in told:
        with Image.open(image.path) as opened:
            opened.draft("RGB", (SIDE, SIDE))
            picture = opened.convert("RGB")
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        if max(picture.size) < SIDE // 2:
            scale = SIDE // 2 / max(picture.size)
            picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
        entry = Entry(row, jpeg(picture), jpeg(heat_map(image, picture, thresholds_of(model, int(image.product))[1])))
        used += len(entry.picture) + len(entry.heat)
        if used > BYTES:
            return
        yield entry


def heat_map(image: ScoredImage, picture: Image.Image, threshold: float | None) -> Image.Image:
    """Draw the anomaly map over a grey picture, with outlines of what is called anomalous and of the true mask."""
    top = 2 * threshold if threshold else float(image.anomaly_map.max())
    shares = (image.anomaly_map.numpy() / max(top, 1e-9)).clip(0, 1)
    shares = np.asarray(Image.fromarray(shares.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    heat = colormaps["inferno"](shares)[..., :3] * 255
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    drawn = (0.8 * heat + 0.2 * grey).astype(np.uint8)
    for mask, color in ((image.mask, MARKED), (image.called_mask, CALLED)):
        if mask is not None and mask.any():
            drawn[_outline(mask.numpy(), picture.size)] = color
    return Image.fromarray(drawn)


def _outline(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Three pixels along the inside of a mask's edge, and of the picture's where the mask reaches it."""
    inside = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(bool)
    return inside & ~binary_erosion(inside, iterations=3)


def jpeg(picture: Image.Image) -> bytes:
    """Return a picture's JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
