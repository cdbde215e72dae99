"""The test images, and the model's results for them."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow.images import raise_for_broken, raise_for_deep
from anomalib_wtflow.lightning_model import WTFlow

Numbers = dict[str, Any]
"""What the JSON of a diagnosis holds."""
WRONG = ("missed", "false alarm")
VERDICTS = (*WRONG, "found", "passed", "called anomalous", "called good", "no threshold")
"""Verdicts on images; of labelled ones, of unlabelled ones, and where there is no threshold."""


class ScoredImage(NamedTuple):
    """A test image and the model's results for it; maps and masks are ``(H, W)``.

    ``anomalous`` and ``mask`` are the truth, None where it is not known; ``score`` and ``anomaly_map`` are raw.
    ``called`` and ``called_mask`` are the verdict, None if the model has no threshold. ``features`` and ``x0``, the
    normalised ones, are ``(C, h, w)``. ``product`` is the index of the product whose normalisation and thresholds hold,
    and ``recognised`` its name, or ``unknown product``.
    """

    path: str
    anomalous: bool | None
    mask: Tensor | None
    score: float
    anomaly_map: Tensor
    called: bool | None
    called_mask: Tensor | None
    features: Tensor
    x0: Tensor
    product: int
    recognised: str

    @property
    def kind(self) -> str:
        """``normal``, ``anomalous`` or ``unlabelled``."""
        return "unlabelled" if self.anomalous is None else "anomalous" if self.anomalous else "normal"

    @property
    def shown_kind(self) -> str:
        """``good``, the folder of a defective image, or ``unlabelled``."""
        return {"normal": "good", "unlabelled": "unlabelled"}.get(self.kind, Path(self.path).parent.name)

    @property
    def verdict(self) -> str:
        """One of :data:`VERDICTS`."""
        if self.called is None:
            return "no threshold"
        if self.anomalous is None:
            return "called anomalous" if self.called else "called good"
        if self.anomalous:
            return "found" if self.called else "missed"
        return "false alarm" if self.called else "passed"


def transformed(model: WTFlow, item: Any) -> tuple[Tensor, Tensor | None]:
    """Return the image and the mask of a data set's item as the model sees them."""
    transform: Any = model.pre_processor.transform  # type: ignore[union-attr]
    return (transform(item.image), None) if item.gt_mask is None else transform(item.image, item.gt_mask)


@torch.no_grad()
def score_image(model: WTFlow, item: Any) -> ScoredImage:
    """Score an item of an anomalib data set as the model does in production.

    Raises:
        WTFlowError: If the image has more than 8 bits a channel, or what becomes of it is NaN or infinite.
    """
    paths = [str(item.image_path)]
    raise_for_deep(paths)
    image, mask = transformed(model, item)
    image = image.to(model.device)
    features = model.model.extract(image[None])
    x0, recognition = model.model.normalise(features)
    raw = model.model.score(x0, recognition, image.shape[-2:])
    raise_for_broken("score", paths, image[None], raw.pred_score, raw.anomaly_map)
    verdict = None if model.post_processor is None else model.post_processor(raw)
    called, marked = (getattr(verdict, name, None) for name in ("pred_label", "pred_mask"))
    label = None if item.gt_label is None else bool(item.gt_label)
    truth = None if mask is None or not mask.any() else mask.squeeze().bool().cpu()
    if label is False:
        truth = torch.zeros(raw.anomaly_map.shape[-2:], dtype=torch.bool)
    return ScoredImage(
        path=paths[0],
        anomalous=label,
        mask=truth,
        score=raw.pred_score.item(),
        anomaly_map=raw.anomaly_map[0, 0].cpu(),
        called=None if called is None else bool(called),
        called_mask=None if marked is None else marked[0, 0].bool().cpu(),
        features=features[0].cpu(),
        x0=x0[0].cpu(),
        product=int(recognition.index),
        recognised=recognition.names(model.products)[0],
    )


def spread(items: Sequence, count: int) -> list:
    """Return at most ``count`` items, evenly spread over all."""
    step = max(1, len(items) / count)
    return [items[int(k * step)] for k in range(min(count, len(items)))]


def informative_first(images: Sequence[ScoredImage], thresholds: Sequence[float | None]) -> list[ScoredImage]:
    """Sort images: wrong verdicts first, the worst first; then right ones, the closest first.

    Defective before good ones. Where there is no truth or no threshold of a product, the highest scores come first.
    """

    def doubt(image: ScoredImage) -> float:
        """Return the sort key: distance of the score from the threshold, negative if wrong."""
        threshold = thresholds[image.product]
        if threshold is None or image.anomalous is None:
            return -image.score
        distance = abs(math.log(max(image.score, 1e-9) / max(threshold, 1e-9)))
        return -distance if image.verdict in WRONG else distance

    ranks: Counter = Counter()
    keys = {}
    for image in sorted(images, key=doubt):
        group = (image.verdict not in WRONG, image.shown_kind == "good", image.shown_kind, image.product)
        keys[image.path] = (group[0], ranks[group], *group[1:])
        ranks[group] += 1
    return sorted(images, key=lambda image: keys[image.path])
