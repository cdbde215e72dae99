"""The test images of the page: facts, picture and anomaly map of each."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import binary_erosion

from anomalib_wtflow.diagnosis.scores import by_product
from anomalib_wtflow.diagnosis.scoring import ScoredImage
from anomalib_wtflow.lightning_model import WTFlow

SIDE = 480
"""Longest side of a picture, in pixels."""
CHARACTERS = 12_000_000
"""How much of a page the pictures may take."""
QUALITY = 85
CALLED, MARKED = (255, 255, 255), (0, 230, 118)
"""Colours of the outlines: what the model marks, and what the mask of the data says."""


def gallery_rows(model: WTFlow, images: Sequence[ScoredImage]) -> list[dict[str, Any]]:
    """Describe the model's result for each image, for the JSON."""
    thresholds = by_product(model, "image_threshold")
    return [
        {
            "file": "/".join(image.path.replace("\\", "/").split("/")[-2:]),
            "kind": image.shown_kind,
            "product": model.products[image.product],
            "recognised": image.recognised,
            "verdict": image.verdict,
            "score": image.score,
            "threshold": thresholds[image.product],
        }
        for image in images
    ]


def entries(model: WTFlow, rows: Iterable[tuple[ScoredImage, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Add ``picture`` and ``heat`` to :func:`gallery_rows`, up to the page's size limit.

    Maps are on a scale that ends at twice the pixel threshold of the product; without one, at the map's own maximum.
    """
    used, thresholds = 0, by_product(model, "pixel_threshold")
    for image, row in rows:
        with Image.open(image.path) as opened:
            opened.draft("RGB", (SIDE, SIDE))
            picture = opened.convert("RGB")
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        if max(picture.size) < SIDE // 2:
            scale = SIDE // 2 / max(picture.size)
            picture = picture.resize([max(1, round(scale * side)) for side in picture.size])
        drawn = {"picture": picture, "heat": heat_map(image, picture, thresholds[image.product])}
        addresses = {name: _address(each) for name, each in drawn.items()}
        used += sum(map(len, addresses.values()))
        if used > CHARACTERS:
            return
        yield row | addresses


def heat_map(image: ScoredImage, picture: Image.Image, threshold: float | None) -> Image.Image:
    """Draw the map over a grey picture, and outline predicted and true defects."""
    top = 2 * threshold if threshold else float(image.anomaly_map.max())
    shares = (image.anomaly_map.numpy() / max(top, 1e-9)).clip(0, 1)
    shares = np.asarray(Image.fromarray(shares.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR))
    heat = colormaps["inferno"](shares)[..., :3] * 255
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    drawn = (0.8 * heat + 0.2 * grey).astype(np.uint8)
    for mask, color in ((image.mask, MARKED), (image.called_mask, CALLED)):
        if mask is not None:
            drawn[_edge(mask.numpy(), picture.size)] = color
    return Image.fromarray(drawn)


def _edge(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the inner edge of a mask, three pixels wide, also along the picture's border."""
    inside = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(bool)
    return inside & ~binary_erosion(inside, iterations=3)


def _address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
