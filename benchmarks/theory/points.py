"""Drawn data for small experiments: points are feature maps of one position, ``(N, C, 1, 1)``."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import binary_auroc

from anomalib_wtflow.flow.path import ProbabilityPath

LINEAR = ProbabilityPath("linear")
TOY_COUPLINGS = ("independent", "optimal", "worst", "worst_of_two", "antipodal")


class Points(NamedTuple):
    """Normal and anomalous points, each ``(N, C, 1, 1)``, whose norms alone tell nothing."""

    normal: Tensor
    anomalous: Tensor


def as_points(flat: Tensor) -> Tensor:
    """Return flat points ``(N, C)`` as feature maps of one position, ``(N, C, 1, 1)``."""
    return flat[:, :, None, None]


def arc(count: int) -> Points:
    """Points near the circle of radius ``sqrt(2)``: the normal ones on its right half, the anomalous ones opposite."""

    def on_circle(angle: Tensor) -> Tensor:
        circle = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=1)
        return as_points(circle + 0.05 * torch.randn(len(angle), 2))

    spread = math.pi * (torch.rand(2, count) - 0.5)
    return Points(on_circle(spread[0]), on_circle(0.8 * spread[1] + math.pi))


def subspace(count: int, channels: int = 128, rank: int = 16) -> Points:
    """Points on the sphere of radius ``sqrt(C)``, near a subspace: 0.2 of off-plane noise if normal, 0.3 if anomalous.

    The noise is relative to the part in the plane, before the point is brought to the sphere.
    """
    basis = torch.linalg.qr(torch.randn(channels, rank)).Q

    def near_plane(noise: float) -> Tensor:
        inside = torch.randn(count, rank) @ basis.T / math.sqrt(rank)
        return as_points(math.sqrt(channels) * normalize(inside + noise * torch.randn(count, channels) / channels**0.5))

    return Points(near_plane(0.2), near_plane(0.3))


DATA: dict[str, Callable[[int], Points]] = {"arc": arc, "subspace": subspace}


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """Probability that an anomalous score exceeds a normal one."""
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))]).int()
    return binary_auroc(torch.cat([normal, anomalous]), labels).item()


def power_law(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of ``y ~ x^p``: the slope of the least-squares line through the logarithms."""
    logs = torch.tensor([x, y], dtype=torch.float64).log()
    centred = logs - logs.mean(dim=1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred[0].square().sum())
