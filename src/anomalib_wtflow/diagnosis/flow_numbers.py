"""Numbers of the flow and of the field."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.diagnosis.measures import centripetal_component, local_lipschitz, radius, trajectory
from anomalib_wtflow.diagnosis.scoring import ScoredImage
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.lightning_model import WTFlow

TIMES = torch.linspace(0, 1, 17)
FIELD_TIMES = torch.logspace(-2, 0, 9)
LIPSCHITZ_IMAGES, ITERATIONS = 4, 10
QUANTILES = {"low": 0.05, "median": 0.5, "high": 0.95}
Fields = Mapping[str, nn.Module]
"""The trained field by the name of its coupling, and perhaps plain rFM's, ``independent``."""


def _series(rows: Sequence[Tensor]) -> dict[str, list[float]]:
    """Return the 5 %, 50 % and 95 % quantiles of each row."""
    quantiles = torch.stack([*rows]).double().cpu().quantile(torch.tensor([*QUANTILES.values()]).double(), dim=1)
    return dict(zip(QUANTILES, quantiles.tolist(), strict=True))


def _stacked(model: WTFlow, images: Sequence[ScoredImage]) -> tuple[Tensor, Tensor]:
    """Return the normalised features of images, and the class embeddings of their products."""
    index = torch.tensor([image.product for image in images])
    return torch.stack([image.x0 for image in images]).to(model.device), model.model.class_embeddings[index]


def _positions(images: Sequence[ScoredImage]) -> Tensor:
    """Select positions by kind of image, ``(N, h, w)``: all, or those half under a defect."""
    masks = [torch.ones(1, 1) if i.mask is None or not i.mask.any() else i.mask.float() for i in images]
    size = images[0].x0.shape[-2:]
    chosen = torch.cat([F.interpolate(mask[None, None], size=size, mode="area")[0] for mask in masks]) > 0.5
    return chosen if chosen.any() else torch.ones_like(chosen)


@torch.no_grad()
def flow_numbers(model: WTFlow, fields: Fields, followed: Mapping[str, Sequence[ScoredImage]]) -> dict[str, Any]:
    """Return radius and centripetal component along the flow, by kind of position.

    Along the flow as it is scored, ``x0 + t (y - x0)``; and along the learnt ODE from ``x(0) = x0``, for each field.
    ``followed`` are images of each kind.
    """
    times = TIMES.tolist()
    result: dict[str, Any] = {"times": times, "positions": {}}
    result |= {"scored": {}, "ode": {name: {} for name in fields}}
    for kind, images in followed.items():
        x0, embedding = _stacked(model, images)
        chosen = _positions(images).to(model.device)
        y = model.model.flow(x0, torch.tensor([image.product for image in images]))
        result["positions"][kind] = int(chosen.sum())
        result["scored"][kind] = {"radius": _series([radius(x0 + t * (y - x0))[chosen] for t in times])}
        for name, field in fields.items():
            velocity = partial(field, class_embedding=embedding)
            points = trajectory(velocity, x0, TIMES)
            slopes = [velocity(x, x.new_full((len(x),), t)) for x, t in zip(points, times, strict=True)]
            inward = [centripetal_component(v, x)[chosen] for v, x in zip(slopes, points, strict=True)]
            radii = [radius(x)[chosen] for x in points]
            result["ode"][name][kind] = {"radius": _series(radii), "centripetal": _series(inward)}
    return result


def field_numbers(model: WTFlow, fields: Fields, images: Sequence[ScoredImage]) -> dict[str, Any]:
    """Return ``||v|| / sqrt(C)`` and local Lipschitz constant of each field on its paths."""
    x0, embedding = _stacked(model, images)
    few = slice(LIPSCHITZ_IMAGES)
    result: dict[str, Any] = {"t": FIELD_TIMES.tolist(), "images": len(x0[few]), "couplings": {}}
    for name, field in fields.items():
        row: dict[str, list[float]] = {"norm": [], "lipschitz": []}
        result["couplings"][name] = row
        for t in FIELD_TIMES.tolist():
            noise = get_coupling(name)(x0, torch.randn_like(x0))
            x_t, _, times = model.model.path.sample(x0, noise, x0.new_full((len(x0),), t))
            with torch.no_grad():
                row["norm"].append(float(radius(field(x_t, times, class_embedding=embedding)).mean()))
            velocity = partial(field, class_embedding=embedding[few])
            row["lipschitz"].append(float(local_lipschitz(velocity, x_t[few], times[few], ITERATIONS).mean()))
    return result
