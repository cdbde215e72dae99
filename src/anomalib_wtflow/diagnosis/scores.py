"""Numbers of the scores: thresholds, guarantees, errors, AUROCs, histograms, flow gain."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from anomalib_wtflow.diagnosis.certainty import (
    auroc_interval,
    difference_interval,
    false_alarm_band,
    mean_interval,
    placements,
    share_interval,
)
from anomalib_wtflow.diagnosis.scoring import WRONG, Numbers, ScoredImage
from anomalib_wtflow.lightning_model import WTFlow


def by_product(model: WTFlow, name: str) -> list[float | None]:
    """Return what the post-processor holds for each product; None where it has nothing."""
    count = len(model.products)
    values = getattr(model.post_processor, name, None)
    rows = [math.nan] * count if values is None else values.flatten().expand(count).tolist()
    return [None if math.isnan(value) else value for value in rows]


def all_numbers(model: WTFlow, images: Sequence[ScoredImage], controls: Mapping[str, Sequence[ScoredImage]]) -> Numbers:
    """Return the numbers of all scores and, for several products, of each.

    Scores of several products are comparable in units of their own thresholds; AUROCs of all are the products' mean.
    ``controls`` are the same images with the scores and maps of controls without a flow, simplest first.
    """
    thresholds = list(zip(by_product(model, "image_threshold"), by_product(model, "pixel_threshold"), strict=True))
    rates, counts = by_product(model, "promised_false_alarm_rate"), by_product(model, "calibration_images")
    products: dict[str, Numbers] = {}
    for k, name in enumerate(model.products):
        group = [image for image in images if image.product == k]
        if group:
            row = {
                **score_numbers(group, thresholds[k]),
                "asked_rate": getattr(model.post_processor, "false_alarm_rate", None),
                "promised_rate": rates[k],
                "calibration_images": counts[k] or None,
                "unknown": sum(image.recognised != name for image in group),
                "controls": {
                    control: separation([image for image in scored if image.product == k])
                    for control, scored in controls.items()
                },
            }
            products[name] = row | joined([row])
    rows = list(products.values())
    if len(model.products) == 1:
        return {"scores": rows[0]}
    units = [[value or 1.0 for value in pair] for pair in thresholds]
    scaled = [
        image._replace(score=image.score / unit, anomaly_map=image.anomaly_map / pixel_unit)
        for image in images
        for unit, pixel_unit in [units[image.product]]
    ]
    whole = score_numbers(scaled, [None if value is None else 1.0 for value in thresholds[0]])
    return {"scores": whole | _means(rows) | joined(rows), "products": products}


def _means(rows: Sequence[Numbers]) -> Numbers:
    """Return the mean AUROCs of the products that have both kinds."""
    known = [row for row in rows if row["image_auroc"] is not None]
    values, intervals = ([row[name] for row in known] for name in ("image_auroc", "image_auroc_interval"))
    pixels = [row["pixel_auroc"] for row in rows if row["pixel_auroc"] is not None]
    return {
        "image_auroc": mean(values) if values else None,
        "image_auroc_interval": mean_interval(values, intervals) if values else None,
        "pixel_auroc": mean(pixels) if pixels else None,
    }


def joined(products: Sequence[Numbers]) -> Numbers:
    """Join the products' guarantees; compare the flow with the control of highest AUROC.

    AUROCs are means over the products that have both kinds; of equal controls the simplest counts.
    """
    groups = [(row["images"].get("normal", 0), row["promised_rate"], row["calibration_images"]) for row in products]
    known = all(rate and count for _, rate, count in groups) and any(images for images, _, _ in groups)
    result = {
        "asked_rate": products[0]["asked_rate"],
        "promised_rate": max((rate for _, rate, _ in groups if rate), default=None),
        "calibration_images": min((count for _, _, count in groups if count), default=None),
        "false_alarm_band": false_alarm_band(groups) if known else None,
        "unknown": sum(row["unknown"] for row in products),
        "strongest_control": None,
    }
    rows = [row for row in products if row["image_auroc"] is not None]
    if not rows or not rows[0]["controls"]:
        return result
    means = {name: mean(row["controls"][name]["image_auroc"] for row in rows) for name in rows[0]["controls"]}
    best = max(means, key=lambda name: means[name])
    pixels = [row["controls"][best]["pixel_auroc"] for row in rows]
    pairs = [(_placements(row), _placements(row["controls"][best])) for row in rows]
    return {
        **result,
        "strongest_control": best,
        "compared_with": list(means),
        "strongest_image_auroc": means[best],
        "strongest_pixel_auroc": None if None in pixels else mean(pixels),
        "flow_gain": mean(row["image_auroc"] for row in rows) - means[best],
        "flow_gain_interval": difference_interval(pairs),
    }


def score_numbers(images: Sequence[ScoredImage], thresholds: Sequence[float | None]) -> Numbers:
    """Return raw scores, thresholds, errors, AUROCs and histograms of images and pixels."""
    result = separation(images)
    scores = result["image_scores"]
    good, bad = (len(scores.get(kind, ())) for kind in ("normal", "anomalous"))
    known = thresholds[0] is not None
    misses, false_alarms = (sum(image.verdict == verdict for image in images) for verdict in WRONG)
    to_find_all = sum(score >= min(scores["anomalous"]) for score in scores["normal"]) if good and bad else None
    return {
        **result,
        "threshold": thresholds[0],
        "pixel_threshold": thresholds[1],
        "images": {kind: len(values) for kind, values in scores.items()},
        "kinds": _called(images),
        "misses": misses if known else None,
        "false_alarms": false_alarms if known else None,
        "miss_interval": share_interval(misses, bad) if known and bad else None,
        "false_alarms_to_find_all": to_find_all,
        "image_auroc_interval": auroc_interval(result["image_auroc"], good, bad) if good and bad else None,
        "image_histogram": _histogram({kind: torch.tensor(values) for kind, values in scores.items()}),
        "pixel_histogram": _histogram(_pixels_by_kind(images)),
    }


def separation(images: Sequence[ScoredImage]) -> Numbers:
    """Return raw scores by kind, and AUROCs of images and pixels (None without both kinds)."""
    scores: dict[str, list[float]] = {}
    for kind in ("normal", "anomalous", "unlabelled"):
        values = [image.score for image in images if image.kind == kind]
        if values:
            scores[kind] = values
    pixels = _pixels_by_kind(images)
    result: Numbers = {"image_scores": scores, "image_auroc": None, "pixel_auroc": None}
    if {"normal", "anomalous"} <= scores.keys():
        result["image_auroc"] = float(_placements(result).mean())
    if {"normal", "anomalous"} <= pixels.keys():
        result["pixel_auroc"] = _auroc(pixels["normal"], pixels["anomalous"])
    return result


def _auroc(normal: Tensor, anomalous: Tensor) -> float:
    """Return the mean of :func:`placements`, by ranks."""
    count = len(anomalous)
    ranks = rankdata(torch.cat([anomalous, normal]).numpy())[:count]
    return float((ranks.mean() - (count + 1) / 2) / len(normal))


def _placements(side: Numbers) -> Any:
    return placements(side["image_scores"]["normal"], side["image_scores"]["anomalous"])


def _pixels_by_kind(images: Sequence[ScoredImage]) -> dict[str, Tensor]:
    """Return the pixels' map values by kind, without defective images that have no mask."""
    pixels = {"normal": [image.anomaly_map[~image.mask] for image in images if image.mask is not None]}
    pixels["anomalous"] = [i.anomaly_map[i.mask] for i in images if i.kind == "anomalous" and i.mask is not None]
    pixels["unlabelled"] = [image.anomaly_map.flatten() for image in images if image.kind == "unlabelled"]
    return {kind: torch.cat(parts) for kind, parts in pixels.items() if parts}


def _called(images: Sequence[ScoredImage]) -> dict[str, dict[str, int]]:
    """Count the images of each kind, good ones first, and those called anomalous."""
    total = Counter(image.shown_kind for image in images)
    called = Counter(image.shown_kind for image in images if image.called)
    return {k: {"images": total[k], "called": called[k]} for k in sorted(total, key=lambda k: (k != "good", k))}


def _histogram(values: Mapping[str, Tensor]) -> dict[str, list[float]] | None:
    if not values:  # defective images without masks, and no good ones: no pixel has a known kind
        return None
    low = min(float(value.min()) for value in values.values())
    high = max(float(value.max()) for value in values.values())
    edges = torch.logspace(math.log10(max(low, 1e-6) * 0.999), math.log10(max(high, 1e-5) * 1.001), 41)
    counts = {kind: torch.histogram(value.clamp(min=edges[0]), edges).hist for kind, value in values.items()}
    return {"edges": edges.tolist(), **{kind: (count / count.sum()).tolist() for kind, count in counts.items()}}
