"""Numbers of the scores: thresholds, errors, AUROCs, histograms; log-density in the place of the proxy."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from anomalib_wtflow.diagnosis.certainty import auroc_interval, mean_interval, placements, share_interval
from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import WRONG, ScoredImage
from anomalib_wtflow.diagnosis.trust_numbers import comparison, number, promise_numbers, promise_of
from anomalib_wtflow.flow.solver import Solver
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.theory.log_density import log_density as log_density_along_flow
from anomalib_wtflow.theory.points import auroc

DivergenceChoice = Literal["exact", "hutchinson"]
LOG_DENSITY_SOLVER = Solver("rk4", 8)


def thresholds_of(model: WTFlow, place: int) -> list[float | None]:
    """Return a product's thresholds, of images and of pixels; None where the model has none."""
    rows = [getattr(model.post_processor, name, None) for name in ("image_threshold", "pixel_threshold")]
    return [None if row is None else number(row[place]) for row in rows]


def by_product(model: WTFlow, images: Sequence[ScoredImage]) -> dict[str, list[ScoredImage]]:
    """Sort images by the product that the model recognises; one that is like none counts to the nearest."""
    groups = {
        name: [image for image in images if int(image.product) == place]
        for place, name in enumerate(model.product_names)
    }
    return {name: group for name, group in groups.items() if group}


def all_numbers(
    model: WTFlow, images: Sequence[ScoredImage], controls: Iterable[tuple[str, list[ScoredImage]]]
) -> dict[str, Any]:
    """Numbers of all scores and, of several products, those of each.

    Scores of several products are comparable in units of their own thresholds; AUROCs of all are the products' mean.

    Args:
        model: The trained model.
        images: The test images.
        controls: By name, the same images with the scores and maps of a control without a flow.
    """
    places = {name: place for place, name in enumerate(model.product_names)}
    without: dict[str, dict[str, Any]] = {name: {} for name in places}
    for control, scored in controls:
        for name, group in by_product(model, scored).items():
            without[name][control] = separation(group)
    products = {}
    for name, group in by_product(model, images).items():
        own = products[name] = score_numbers(group, thresholds_of(model, places[name]))
        own.update(promise_numbers([(own, promise_of(model, places[name]))]))
        own["controls"] = without[name]
        own.update(comparison([own]))
        own["unknown"] = sum(image.recognised != name for image in group)
    if len(places) == 1:
        return {"scores": next(iter(products.values()))}
    return {"scores": _of_all(model, images, products), "products": products}


def _of_all(model: WTFlow, images: Sequence[ScoredImage], products: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Numbers of all products: scores in units of thresholds, means of AUROCs, sums of errors."""
    units = [[value or 1.0 for value in thresholds_of(model, place)] for place in range(len(model.product_names))]
    scaled = [
        image._replace(score=image.score / image_unit, anomaly_map=image.anomaly_map / pixel_unit)
        for image in images
        for image_unit, pixel_unit in [units[int(image.product)]]
    ]
    whole = score_numbers(scaled, [None if value is None else 1.0 for value in thresholds_of(model, 0)])
    rows = list(products.values())
    for name in ("image_auroc", "pixel_auroc"):
        values = [own[name] for own in rows if own[name] is not None]
        whole[name] = sum(values) / len(values) if values else None
    intervals = [(own["image_auroc"], own["image_auroc_interval"]) for own in rows if own["image_auroc"] is not None]
    whole["image_auroc_interval"] = mean_interval(*zip(*intervals, strict=True)) if intervals else None
    pairs = [(own, promise_of(model, model.product_names.index(name))) for name, own in products.items()]
    whole.update(promise_numbers(pairs))
    whole["unknown"] = sum(own["unknown"] for own in rows)
    whole.update(comparison(rows))
    return whole


def separation(images: Sequence[ScoredImage]) -> dict[str, Any]:
    """Raw scores by kind, and AUROCs of images and pixels; None where there are not both kinds."""
    scores = _by_kind(images)
    pixels = _pixels_by_kind(images)
    both = [{"normal", "anomalous"} <= values.keys() for values in (scores, pixels)]
    return {
        "image_scores": scores,
        "image_auroc": float(placements(scores["normal"], scores["anomalous"]).mean()) if both[0] else None,
        "pixel_auroc": auroc(pixels["normal"], pixels["anomalous"]) if both[1] else None,
    }


def _by_kind(images: Sequence[ScoredImage]) -> dict[str, list[float]]:
    """Scores of the images of each kind that is there."""
    scores: dict[str, list[float]] = {}
    for kind in ("normal", "anomalous", "unlabelled"):
        values = [image.score for image in images if image.kind == kind]
        if values:
            scores[kind] = values
    return scores


def _pixels_by_kind(images: Sequence[ScoredImage]) -> dict[str, Tensor]:
    """Map values of the pixels of each kind that is there; those of defective images without masks are left out."""
    pixels = {"normal": [image.anomaly_map[~image.mask] for image in images if image.mask is not None]}
    pixels["anomalous"] = [i.anomaly_map[i.mask] for i in images if i.kind == "anomalous" and i.mask is not None]
    pixels["unlabelled"] = [image.anomaly_map.flatten() for image in images if image.kind == "unlabelled"]
    return {kind: torch.cat(parts) for kind, parts in pixels.items() if parts}


def score_numbers(images: Sequence[ScoredImage], thresholds: Sequence[float | None]) -> dict[str, Any]:
    """Raw scores, thresholds, errors at them, AUROCs, and histograms of the density proxy of images and pixels."""
    result: dict[str, Any] = {
        "threshold": thresholds[0],
        "pixel_threshold": thresholds[1],
        "images": {kind: len(values) for kind, values in _by_kind(images).items()},
        "kinds": _called(images),
        **separation(images),
    }
    counts = {verdict: sum(image.verdict == verdict for image in images) for verdict in WRONG}
    known = thresholds[0] is not None
    result["misses"], result["false_alarms"] = (counts[verdict] if known else None for verdict in WRONG)
    good, bad = (result["images"].get(kind, 0) for kind in ("normal", "anomalous"))
    result["miss_interval"] = share_interval(counts["missed"], bad) if known and bad else None
    result["image_auroc_interval"] = auroc_interval(result["image_auroc"], good, bad) if good and bad else None
    scores = result["image_scores"]
    result["false_alarms_to_find_all"] = (
        sum(score >= min(scores["anomalous"]) for score in scores["normal"]) if good and bad else None
    )
    result["image_histogram"] = _histogram({kind: torch.tensor(values) for kind, values in scores.items()})
    result["pixel_histogram"] = _histogram(_pixels_by_kind(images))
    return result


def _called(images: Sequence[ScoredImage]) -> dict[str, dict[str, int]]:
    """Images of each kind, good ones first, and how many of them are called anomalous."""
    kinds = sorted({image.shown_kind for image in images}, key=lambda kind: (kind != "good", kind))
    members = {kind: [image for image in images if image.shown_kind == kind] for kind in kinds}
    return {
        kind: {"images": len(group), "called": sum(bool(image.called) for image in group)}
        for kind, group in members.items()
    }


def _histogram(values: dict[str, Tensor]) -> dict[str, list[float]] | None:
    if not values:  # defective images without masks, and no good ones: no pixel has a known kind
        return None
    low = min(float(value.min()) for value in values.values())
    high = max(float(value.max()) for value in values.values())
    edges = torch.logspace(math.log10(max(low, 1e-6) * 0.999), math.log10(max(high, 1e-5) * 1.001), 41)
    counts = {kind: torch.histogram(value.clamp(min=edges[0]), edges).hist for kind, value in values.items()}
    return {"edges": edges.tolist(), **{kind: (count / count.sum()).tolist() for kind, count in counts.items()}}


def log_density_numbers(
    model: WTFlow, images: Sequence[ScoredImage], method: DivergenceChoice, show: Progress
) -> dict[str, Any]:
    """Score each image by ``-log p / C`` along the ODE in place of the density proxy, with the same map and top share.

    From ``a_{t_s} x0`` at the start time to t = 1, in eight RK4 steps.
    """
    torch_model = model.model
    start = model.settings.start_time
    scale = torch_model.start_scale
    pointwise = torch_model.flow_field.pointwise
    generator = torch_model.anomaly_map_generator.without_limit()
    scores: dict[str, list[list[float]]] = {}
    for image in show(images, "Log-density along the flow", len(images)):
        x = scale * image.x0[None].to(model.device)
        _, channels, height, width = x.shape
        samples = x.movedim(1, -1).reshape(-1, channels, 1, 1) if pointwise else x
        product = image.product.to(model.device)
        told = partial(torch_model.flow_field, condition=torch_model.condition(product))
        values = log_density_along_flow(told, samples, start, 1.0, method, solver=LOG_DENSITY_SOLVER)
        log_p = values.view(1, 1, height, width) / channels
        _, score = generator(log_p, image.anomaly_map.shape, product)
        scores.setdefault(image.kind, []).append([image.score, score.item()])
    both = "normal" in scores and "anomalous" in scores
    columns = {kind: torch.tensor(rows).T for kind, rows in scores.items()}
    return {
        "method": method,
        "scores": scores,
        "auroc": [auroc(columns["normal"][k], columns["anomalous"][k]) if both else None for k in range(2)],
    }
