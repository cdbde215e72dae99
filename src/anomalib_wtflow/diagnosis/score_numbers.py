"""Numbers of the scores: thresholds, errors, AUROCs, histograms; log-density in the place of the proxy."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import ScoredImage
from anomalib_wtflow.flow.solver import Solver
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.theory.log_density import log_density as log_density_along_flow
from anomalib_wtflow.theory.points import auroc

DivergenceChoice = Literal["exact", "hutchinson"]
LOG_DENSITY_SOLVER = Solver("rk4", 8)


def _number(value: Tensor | float | None) -> float | None:
    number = float("nan") if value is None else float(value)
    return number if number == number else None


def thresholds_of(model: WTFlow, place: int) -> list[float | None]:
    """Return a product's thresholds, of images and of pixels; None where the model has none."""
    rows = [getattr(model.post_processor, name, None) for name in ("image_threshold", "pixel_threshold")]
    return [None if row is None else _number(row[place]) for row in rows]


def by_product(model: WTFlow, images: Sequence[ScoredImage]) -> dict[str, list[ScoredImage]]:
    """Sort images by the product that the model recognises; one that is like none counts to the nearest."""
    groups = {
        name: [image for image in images if int(image.product) == place]
        for place, name in enumerate(model.product_names)
    }
    return {name: group for name, group in groups.items() if group}


def all_numbers(model: WTFlow, images: Sequence[ScoredImage]) -> dict[str, Any]:
    """Numbers of all scores and, of several products, those of each.

    Scores of several products are comparable in units of their own thresholds; AUROCs of all are the products' mean.
    """
    if len(model.product_names) == 1:
        return {"scores": score_numbers(model, images, thresholds_of(model, 0))}
    places = {name: place for place, name in enumerate(model.product_names)}
    groups = by_product(model, images)
    products = {name: score_numbers(model, group, thresholds_of(model, places[name])) for name, group in groups.items()}
    units = {place: [value or 1.0 for value in thresholds_of(model, place)] for place in places.values()}
    scaled = [
        image._replace(score=image.score / image_unit, anomaly_map=image.anomaly_map / pixel_unit)
        for image in images
        for image_unit, pixel_unit in [units[int(image.product)]]
    ]
    known = [value is not None for value in thresholds_of(model, 0)]
    whole = score_numbers(model, scaled, [1.0 if each else None for each in known])
    for name in ("image_auroc", "pixel_auroc", "image_auroc_no_flow", "pixel_auroc_no_flow"):
        values = [numbers[name] for numbers in products.values() if numbers[name] is not None]
        whole[name] = sum(values) / len(values) if values else None
    for name, numbers in products.items():
        numbers["unknown"] = sum(image.recognised != name for image in groups[name])
    return {"scores": whole, "products": products}


def score_numbers(model: WTFlow, images: Sequence[ScoredImage], thresholds: Sequence[float | None]) -> dict[str, Any]:
    """Raw scores, thresholds, errors at them, AUROCs, and histograms of the density proxy of images and pixels."""
    kinds = {kind: [image for image in images if image.kind == kind] for kind in ("normal", "anomalous", "unlabelled")}
    result: dict[str, Any] = {
        "threshold": thresholds[0],
        "pixel_threshold": thresholds[1],
        "images": {kind: len(members) for kind, members in kinds.items() if members},
        "false_alarms": sum(bool(image.called) for image in kinds["normal"]) if thresholds[0] is not None else None,
        "misses": sum(image.called is False for image in kinds["anomalous"]) if thresholds[0] is not None else None,
        "image_scores": {kind: [image.score for image in members] for kind, members in kinds.items() if members},
    }
    pixels = {"normal": [image.anomaly_map[~image.mask] for image in images if image.mask is not None]}
    pixels["anomalous"] = [image.anomaly_map[image.mask] for image in kinds["anomalous"] if image.mask is not None]
    pixels["unlabelled"] = [image.anomaly_map.flatten() for image in kinds["unlabelled"]]
    joined = {kind: torch.cat(parts) for kind, parts in pixels.items() if parts}
    scores = {kind: torch.tensor(values) for kind, values in result["image_scores"].items()}
    without_flow = _without_flow(model, images)
    for (name, values), control in zip((("image", scores), ("pixel", joined)), without_flow, strict=True):
        both = "normal" in values and "anomalous" in values
        result[f"{name}_auroc"] = auroc(values["normal"], values["anomalous"]) if both else None
        result[f"{name}_auroc_no_flow"] = auroc(control["normal"], control["anomalous"]) if both else None
        if not values:  # defective images without masks, and no good ones: no pixel has a known kind
            result[f"{name}_histogram"] = None
            continue
        low = min(float(value.min()) for value in values.values())
        high = max(float(value.max()) for value in values.values())
        edges = torch.logspace(math.log10(max(low, 1e-6) * 0.999), math.log10(max(high, 1e-5) * 1.001), 41)
        counts = {kind: torch.histogram(value.clamp(min=edges[0]), edges).hist for kind, value in values.items()}
        result[f"{name}_histogram"] = {
            "edges": edges.tolist(),
            **{kind: (count / count.sum()).tolist() for kind, count in counts.items()},
        }
    return result


def _without_flow(model: WTFlow, images: Sequence[ScoredImage]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The control: scores of images and of pixels by kind from the density proxy of the features, ``y = x0``."""
    generator = model.model.anomaly_map_generator.without_limit()
    scores: dict[str, list[Tensor]] = {}
    pixels: dict[str, list[Tensor]] = {}
    for image in images:
        log_density = model.model.log_density(image.x0[None].to(model.device))
        result = generator(log_density, image.anomaly_map.shape, image.product.to(model.device))
        anomaly_map, score = (values.cpu() for values in result)
        scores.setdefault(image.kind, []).append(score)
        if image.mask is not None:
            pixels.setdefault("normal", []).append(anomaly_map[0, 0][~image.mask])
            pixels.setdefault("anomalous", []).append(anomaly_map[0, 0][image.mask])
    joined = [{kind: torch.cat(parts) for kind, parts in kinds.items()} for kinds in (scores, pixels)]
    return joined[0], joined[1]


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
