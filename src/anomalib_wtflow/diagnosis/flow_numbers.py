"""Numbers of the flow and the field."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import ScoredImage, spread
from anomalib_wtflow.flow.coupling import get_coupling, optimal_image
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.lightning_model import WTFlow
from anomalib_wtflow.theory.diagnostics import centripetal_component, local_lipschitz, radius, trajectory

ODE_TIMES = torch.linspace(0, 1, 17)
FIELD_TIMES = torch.logspace(-2, 0, 9)
LIPSCHITZ_IMAGES = 4


def _quantiles(values: Tensor) -> dict[str, float]:
    low, median, high = values.flatten().double().cpu().quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    return {"low": low, "median": median, "high": high}


def _series(rows: Iterable[Tensor]) -> dict[str, list[float]]:
    """5 %, 50 % and 95 % quantiles of each row."""
    quantiles = [_quantiles(row) for row in rows]
    return {key: [row[key] for row in quantiles] for key in ("low", "median", "high")}


def _positions(images: Sequence[ScoredImage]) -> Tensor:
    """Which feature positions stand for the kind of their image, ``(N, h, w)``: all, or those half under a defect."""
    size = images[0].x0.shape[-2:]
    chosen = [
        torch.ones(size, dtype=torch.bool)
        if image.mask is None or not image.mask.any()
        else F.interpolate(image.mask[None, None].float(), size=size, mode="area")[0, 0] > 0.5
        for image in images
    ]
    return torch.stack(chosen)


def flow_and_field_numbers(
    model: WTFlow, fields: dict[str, nn.Module], images: list[ScoredImage], count: int, show: Progress
) -> dict[str, Any]:
    """Numbers of the flow and of the field, at the positions of at most ``count`` images of each kind."""
    kinds = ("normal", "anomalous", "unlabelled")
    followed = {kind: spread([image for image in images if image.kind == kind], count) for kind in kinds}
    followed = {kind: chosen for kind, chosen in followed.items() if chosen}
    return {
        "flow": flow_numbers(model, fields, followed, show),
        "field": field_numbers(model, fields, followed.get("normal") or images[:count], show),
    }


def flow_numbers(
    model: WTFlow, fields: dict[str, nn.Module], followed: dict[str, list[ScoredImage]], show: Progress
) -> dict[str, Any]:
    """Radius, centripetal component and cosine to the optimal-transport direction along the flow, by kind of position.

    Along the flow as it is scored, ``x0 + tau (y - x0)``; and along the learnt ODE from ``x(0) = x0``, for the trained
    and the plain field. The optimal-transport direction is ``eps - x0``, eps coupled to x0 by ``optimal_image``.
    """
    field, coupled = model.model.field, model.model.channels
    channels = sum(coupled) if field.pointwise else next(iter(followed.values()))[0].x0.shape[0]
    start = {"independent": 0.0, "worst_of_two": (2 / torch.pi / channels) ** 0.5, "antipodal": 1.0}
    result: dict[str, Any] = {
        "ode_times": ODE_TIMES.tolist(),
        "couplings": list(fields),
        "trained_coupling": model.settings.coupling,
        "start_time": model.settings.start_time,
        "predicted_start": dict.fromkeys(fields),
        "positions": {},
        "scored": {},
        "ode": {name: {} for name in fields},
    }
    jobs = [(kind, members, name) for kind, members in followed.items() for name in fields]
    for kind, members, name in show(jobs, "Following the flow", len(jobs)):
        with torch.no_grad():
            x0 = torch.stack([image.x0 for image in members]).to(model.device)
            chosen = _positions(members).to(model.device)
            if not chosen.any():
                chosen = torch.ones_like(chosen)
            product = torch.cat([image.product for image in members]).to(model.device)
            told = partial(fields[name], condition=model.model.condition(product))
            result["ode"][name][kind] = _along_the_ode(told, x0, chosen)
            if kind == "normal" and name in start:
                middle = result["ode"][name][kind]["radius"]["median"][0]
                result["predicted_start"][name] = predicted_component(model.model.path, start[name], middle)
            if name == model.settings.coupling:
                y = model.model.flow(x0, product)
                steps = torch.linspace(0, 1, 21)
                result["scored"][kind] = {
                    "tau": steps.tolist(),
                    "radius": _series(radius(x0 + tau * (y - x0))[chosen] for tau in steps),
                }
                result["positions"][kind] = int(chosen.sum())
    return result


def _along_the_ode(field: Callable[..., Tensor], x0: Tensor, chosen: Tensor) -> dict[str, dict[str, list[float]]]:
    optimal = optimal_image(x0, torch.randn_like(x0)) - x0
    points = trajectory(field, x0, ODE_TIMES)
    velocities = [
        field(x, torch.full((len(x),), t, device=x.device)) for x, t in zip(points, ODE_TIMES.tolist(), strict=True)
    ]
    pairs = list(zip(points, velocities, strict=True))
    return {
        "radius": _series(radius(x)[chosen] for x in points),
        "centripetal": _series(centripetal_component(v, x)[chosen] for x, v in pairs),
        "cosine_to_optimal": _series(F.cosine_similarity(v, optimal, dim=1)[chosen] for v in velocities),
    }


def predicted_component(path: ProbabilityPath, strength: float, radius: float) -> float:
    """Component along x of the exact field at t = 0: ``a'_0 / a_0 - s'_0 c / r`` (ours).

    Args:
        path: The probability path; on the linear one this is ``-1 - c / r``.
        strength: c, minus the mean component of the coupled noise along the data, in units of sqrt(C).
        radius: r, the data's norm in the same units.
    """
    at = path.coefficients(torch.tensor(0.0))
    return float(at.da / at.a - at.ds * strength / radius)


def field_numbers(
    model: WTFlow, fields: dict[str, nn.Module], images: Sequence[ScoredImage], show: Progress
) -> dict[str, Any]:
    """Norm ``||v|| / sqrt(C)`` and local Lipschitz constant of each field at points of the paths it was trained on."""
    x0 = torch.stack([image.x0 for image in images]).to(model.device)
    condition = model.model.condition(torch.cat([image.product for image in images]).to(model.device))
    times = FIELD_TIMES.tolist()
    result: dict[str, Any] = {"t": times, "images": min(len(x0), LIPSCHITZ_IMAGES), "couplings": {}}
    for name, field in fields.items():
        norms, constants = [], []
        for t in show(times, f"Measuring the field ({name})", len(times)):
            noise = get_coupling(name)(x0, torch.randn_like(x0))
            sample = model.model.path.sample(x0, noise, torch.full((len(x0),), t, device=x0.device))
            with torch.no_grad():
                norms.append(float(radius(field(sample.x_t, sample.t, condition=condition)).mean()))
            few = slice(LIPSCHITZ_IMAGES)
            told = partial(field, condition=condition[few])
            constants.append(float(local_lipschitz(told, sample.x_t[few], sample.t[few], 10).mean()))
        result["couplings"][name] = {"norm": norms, "lipschitz": constants}
    return result
