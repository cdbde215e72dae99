"""Images and verdicts made by hand, and the numbers and the page of them, without a trained model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from anomalib_wtflow.diagnosis import gallery
from anomalib_wtflow.diagnosis.front import front
from anomalib_wtflow.diagnosis.report import make_folder, write_report
from anomalib_wtflow.diagnosis.score_numbers import all_numbers
from anomalib_wtflow.diagnosis.scoring import ScoredImage
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
        effective_false_alarm_rate=torch.full((count,), max(1, int(rate * (images + 1))) / (images + 1)),
        false_alarm_rate=rate,
        calibration_images=torch.full((count,), images),
    )
    return SimpleNamespace(product_names=list(names), post_processor=post_processor)


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
        torch.tensor([product]),
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


def write_page(output: Path, model: Any, images: Sequence[ScoredImage]) -> Path:
    """Write the page of images; the controls without a flow score all images alike, and as the model."""
    images = gallery.ranked_images(model, images)
    alike = [image._replace(score=1.0) for image in images]
    controls = [(UNWHITENED, alike), (WHITENED, list(images))]
    numbers = {"checkpoint": "model.ckpt", "images": gallery.rows(model, images)}
    numbers |= all_numbers(model, images, controls)
    make_folder(output)
    shown = list(gallery.entries(model, zip(images, numbers["images"], strict=True)))
    numbers["images_shown"] = len(shown)
    return write_report(output, "Drawn parts", "By hand.", [], numbers, front(output, numbers, shown))
