"""The test images, and what the model makes of them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.training.image_check import raise_for_unreadable

TINY = 1e-9
WRONG = ("missed", "false alarm")
VERDICTS = (*WRONG, "found", "passed", "called anomalous", "called good", "no threshold")
"""Verdicts on images; of labelled ones, of unlabelled ones, and where there is no threshold."""


class ScoredImage(NamedTuple):
    """A test image and what the model made of it; maps and masks are ``(H, W)``.

    ``features`` and ``x0``, the normalised ones, are ``(C, h, w)``.

    ``product`` is the place of the product whose normalisation and thresholds hold, ``(1,)``, and ``recognised`` its
    name, or ``unknown product``.

    ``anomalous`` and ``mask`` are the truth, None where it is not known; ``score`` and ``anomaly_map`` are raw;
    ``called`` and ``called_mask`` are the verdict, None if the model has no threshold.
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
    product: Tensor
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
        return {(False, True): "false alarm", (True, False): "missed", (True, True): "found"}.get(
            (self.anomalous, self.called), "passed"
        )


def items(data: Any, indices: Iterable[int]) -> Iterator[Any]:
    """Yield items of a data set; an image that cannot be read is named.

    Raises:
        ValueError: If there is one.
    """
    try:
        for index in indices:
            yield data[index]
    except (OSError, SyntaxError, ValueError) as error:
        raise_for_unreadable([data], decode=True, cause=error)
        raise


def transform(model: WTFlow, item: Any) -> tuple[Tensor, Tensor | None]:
    """Return an item's image and mask as the model sees them."""
    transform = getattr(model.pre_processor, "transform", None)
    mask = getattr(item, "gt_mask", None)
    if transform is None:
        return item.image, mask
    return (transform(item.image), None) if mask is None else transform(item.image, mask)


@torch.no_grad()
def score_images(model: WTFlow, data: Any, show: Progress) -> Iterator[ScoredImage]:
    """Score each image of an anomalib data set as the model does in production.

    Raises:
        ValueError: If an image cannot be read, or what becomes of it is NaN or infinite.
    """
    for item in show(items(data, range(len(data))), "Scoring the test images", len(data)):
        image, mask = transform(model, item)
        images = image[None].to(model.device)
        features = model.model.extract(images)
        x0, product, strangeness = model.model.normalise(features)
        raw: Any = model.model.score(x0, image.shape[-2:], product, strangeness)
        model.raise_for_broken(raw, images, [str(item.image_path)])
        verdict: Any = raw if model.post_processor is None else model.post_processor(raw)
        label = None if item.gt_label is None else bool(item.gt_label)
        truth = None if mask is None else mask.squeeze().bool().cpu()
        if label and (truth is None or not truth.any()):
            truth = None
        elif label is False:
            truth = torch.zeros(raw.anomaly_map.shape[-2:], dtype=torch.bool)
        yield ScoredImage(
            path=str(item.image_path),
            anomalous=label,
            mask=truth,
            score=raw.pred_score.item(),
            anomaly_map=raw.anomaly_map[0, 0].cpu(),
            called=None if verdict.pred_label is None else bool(verdict.pred_label),
            called_mask=None if verdict.pred_mask is None else verdict.pred_mask[0, 0].bool().cpu(),
            features=features[0].cpu(),
            x0=x0[0].cpu(),
            product=product.cpu(),
            recognised=model.recognised(raw)[0],
        )


def spread(items: Sequence, count: int) -> list:
    """At most ``count`` items, evenly spread over all."""
    step = max(1, len(items) / count)
    return [items[int(k * step)] for k in range(min(count, len(items)))]


def informative_first(images: Sequence[ScoredImage], thresholds: Sequence[float | None]) -> list[ScoredImage]:
    """Wrong verdicts first, the worst of each product and kind in turn; then the others, the closest calls in turn.

    Defective before good ones. Where there is no truth or no threshold, the highest scores come first.

    Args:
        images: The images.
        thresholds: Of each product.
    """

    def distance(image: ScoredImage) -> float:
        threshold = thresholds[int(image.product)]
        if threshold is None or image.anomalous is None:
            return -image.score
        return abs(math.log(max(image.score, TINY) / max(threshold, TINY)))

    groups: dict[tuple[bool, int, str], list[ScoredImage]] = {}
    for image in images:
        right = image.verdict not in WRONG
        groups.setdefault((right, int(image.product), image.shown_kind), []).append(image)
    ranked = []
    for (right, product, kind), members in groups.items():
        # A wrong verdict is the worse, and a right one the safer, the farther the score is from the threshold.
        members.sort(key=distance, reverse=not right)
        ranked += [((right, rank, kind == "good", kind, product), image) for rank, image in enumerate(members)]
    return [image for _, image in sorted(ranked, key=lambda each: each[0])]
