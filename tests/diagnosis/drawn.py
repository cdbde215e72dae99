"""Images and verdicts made by hand, and the numbers and the page of them, without a trained model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from anomalib_wtflow.diagnosis.gallery import entries, gallery_rows
from anomalib_wtflow.diagnosis.page import write_page
from anomalib_wtflow.diagnosis.scores import all_numbers, by_product
from anomalib_wtflow.diagnosis.scoring import ScoredImage, informative_first
from anomalib_wtflow.diagnosis.without_flow import UNWHITENED, WHITENED

SIDE = 64


def model_of(
    thresholds: Sequence[float], names: Sequence[str] = ("disc",), images: int = 39, rate: float = 0.05
) -> Any:
    """What a diagnosis asks of a trained model: its products, their thresholds, and what these promise."""
    count = len(names)
    post_processor = SimpleNamespace(
        image_threshold=torch.tensor(thresholds),
        pixel_threshold=torch.ones(count),
        promised_false_alarm_rate=torch.full((count,), max(1, int(rate * (images + 1))) / (images + 1)),
        false_alarm_rate=rate,
        calibration_images=torch.full((count,), images),
    )
    return SimpleNamespace(products=list(names), post_processor=post_processor)


def scored(path: Path | str, label: bool | None, score: float, threshold: float | None = 1.0, product: int = 0) -> Any:
    """An image with a square under which the map is high; called anomalous above the threshold."""
    square = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    square[16:32, 16:48] = True
    called = None if threshold is None else score > threshold
    nothing = torch.zeros(1, 1, 1)
    mask = None if label is None else square if label else torch.zeros_like(square)
    anomaly_map = 0.5 + score * square.float()
    marked = None if threshold is None else anomaly_map > 1
    names = {0: "disc", 1: "plate"}
    return ScoredImage(
        str(path),
        label,
        mask,
        score,
        anomaly_map,
        called,
        marked,
        nothing,
        nothing,
        product,
        names[product],
    )


def write_images(folder: Path, rows: Sequence[tuple[str, float, int]]) -> list[ScoredImage]:
    """Draw an image for each kind, score and product; good ones are of the kind ``good``."""
    images = []
    for place, (kind, score, product) in enumerate(rows):
        path = folder / str(product) / "test" / kind / f"{place:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((96, 128, 3), 40 + 10 * place % 200, dtype=np.uint8)).save(path)
        images.append(scored(path, None if kind == "unlabelled" else kind != "good", score, product=product))
    return images


def diagnosed(output: Path, model: Any, images: Sequence[ScoredImage]) -> Path:
    """Write the page of images; the controls without a flow score all images alike, and as the model."""
    images = informative_first(images, by_product(model, "image_threshold"))
    controls = {UNWHITENED: [image._replace(score=1.0) for image in images], WHITENED: images}
    series = {"low": [0.5, 0.4], "median": [1.0, 0.5], "high": [1.5, 0.6]}
    along = {"normal": {"radius": series, "centripetal": series}}
    numbers = {
        "checkpoint": "model <1>.ckpt",
        "settings": {"backbone": "<i>"},
        "images": gallery_rows(model, images),
        **all_numbers(model, images, controls),
        "flow": {"times": [0, 1], "scored": {"normal": {"radius": series}}, "ode": {"worst": along}},
        "field": {"t": [0.1, 1], "images": 1, "couplings": {"worst": {"norm": [1, 2], "lipschitz": [1, 2]}}},
    }
    output.mkdir()
    return write_page(output, numbers, list(entries(model, zip(images, numbers["images"], strict=True))))
