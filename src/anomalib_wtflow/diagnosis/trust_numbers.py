"""Numbers that say how far a model can be trusted: what its threshold promises, and what its flow is worth."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from anomalib_wtflow.diagnosis.certainty import difference_interval, false_alarm_band, placements
from anomalib_wtflow.diagnosis.without_flow import NAMES
from anomalib_wtflow.lightning_model import WTFlow


def number(value: Tensor | float | None) -> float | None:
    """Return a number; None for NaN, which JSON does not have."""
    result = float("nan") if value is None else float(value)
    return result if result == result else None


def promise_of(model: WTFlow, place: int) -> dict[str, Any]:
    """Return the false-alarm rate that was asked for, what a product's threshold promises, and from how many images."""
    post: Any = model.post_processor
    if not hasattr(post, "effective_false_alarm_rate"):
        return {"asked_rate": None, "promised_rate": None, "calibration_images": None}
    return {
        "asked_rate": post.false_alarm_rate,
        "promised_rate": number(post.effective_false_alarm_rate[place]),
        "calibration_images": int(post.calibration_images[place]) or None,
    }


def promise_numbers(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Join products' promises: the largest rate, the fewest images, and how many false alarms they make likely.

    Args:
        rows: For each product, the numbers of its scores, and its :func:`promise_of`.
    """
    told = [(own, promise) for own, promise in rows if promise["promised_rate"] and promise["calibration_images"]]
    groups = [
        (own["images"].get("normal", 0), promise["promised_rate"], promise["calibration_images"])
        for own, promise in told
    ]
    whole = len(groups) == len(rows) and any(images for images, _, _ in groups)
    return {
        "asked_rate": rows[0][1]["asked_rate"],
        "promised_rate": max(
            (promise["promised_rate"] for _, promise in rows if promise["promised_rate"]), default=None
        ),
        "calibration_images": min((count for _, _, count in groups), default=None),
        "false_alarm_band": false_alarm_band(groups) if whole else None,
    }


def comparison(products: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare the flow with the control of the highest image AUROC, mean over the products that have both kinds.

    Args:
        products: For each product, the numbers of its scores, and of those of the ``controls``.

    Returns:
        Name and AUROCs of the strongest control (of equals the simplest), and how far the flow's image AUROC is above.
    """
    rows = [own for own in products if own["image_auroc"] is not None]
    names = [name for name in NAMES if rows and all(name in own["controls"] for own in rows)]
    if not names:
        return {"strongest_control": None, "compared_with": []}
    means = {name: _mean(own["controls"][name]["image_auroc"] for own in rows) for name in names}
    best = max(means, key=lambda name: means[name])
    pixels = [own["controls"][best]["pixel_auroc"] for own in rows]
    pairs = [(_placements(own), _placements(own["controls"][best])) for own in rows]
    return {
        "strongest_control": best,
        "compared_with": names,
        "strongest_image_auroc": means[best],
        "strongest_pixel_auroc": None if None in pixels else _mean(pixels),
        "flow_gain": _mean(own["image_auroc"] for own in rows) - means[best],
        "flow_gain_interval": difference_interval(pairs),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _placements(side: dict[str, Any]) -> Any:
    return placements(side["image_scores"]["normal"], side["image_scores"]["anomalous"])
