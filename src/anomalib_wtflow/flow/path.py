"""Probability paths: how a data point is carried to noise, and with which velocity.

Time runs from the data (t = 0) to the noise (t = 1).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow.flow.registry import lookup


class Coefficients(NamedTuple):
    """``a_t``, ``s_t`` and their time derivatives, each of the shape of ``t``."""

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor


class PathSample(NamedTuple):
    """A point on a path and its velocity, ``(N, C, H, W)`` each, and its time, ``(N,)``."""

    x_t: Tensor
    velocity: Tensor
    t: Tensor


def linear(t: Tensor, s_min: float) -> Coefficients:
    """``a_t = 1 - t, s_t = t``: linear path (arXiv 2508.05461v3); ``s_min`` has no effect."""
    del s_min
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def gaussian(t: Tensor, s_min: float) -> Coefficients:
    """``a_t = 1 - t, s_t = s_min + (1 - s_min) t``: Gaussian path (arXiv 2508.05461v3)."""
    one = torch.ones_like(t)
    return Coefficients(1 - t, s_min + (1 - s_min) * t, -one, (1 - s_min) * one)


def variance_preserving(t: Tensor, s_min: float) -> Coefficients:
    """``a_t = cos(w_t), s_t = sin(w_t)``, w_t linear from asin(s_min) to pi/2 (ours).

    ``a_t^2 + s_t^2 = 1``; the path starts at ``a_0 = sqrt(1 - s_min^2)``, not at 1.
    """
    start = math.asin(s_min)
    speed = math.pi / 2 - start
    angle = start + speed * t
    a, s = angle.cos(), angle.sin()
    return Coefficients(a, s, -speed * s, speed * a)


PATHS: dict[str, Callable[[Tensor, float], Coefficients]] = {
    "linear": linear,
    "gaussian": gaussian,
    "variance_preserving": variance_preserving,
}


class ProbabilityPath:
    """``x_t = a_t x0 + s_t eps``, an affine path with velocity ``u_t = a'_t x0 + s'_t eps``.

    The formula is arXiv 2508.05461v3's; see each entry of :data:`PATHS` for its coefficients.

    Args:
        name: One of :data:`PATHS`.
        s_min: Noise level at t = 0, in [0, 1); the linear path has none.

    Raises:
        WTFlowError: If the name is unknown.
    """

    def __init__(self, name: str = "linear", s_min: float = 0.01) -> None:
        self._coefficients = lookup(PATHS, "path", name)
        self.name = name
        self.s_min = s_min

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a_t, s_t, a'_t, s'_t`` for times in [0, 1] of any shape."""
        return self._coefficients(t, self.s_min)

    def sample(self, x0: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """Evaluate the path and its velocity.

        Args:
            x0: Data, ``(N, C, H, W)``.
            noise: Coupled noise, ``(N, C, H, W)``.
            t: Times in [0, 1], ``(N,)``.

        Returns:
            The point, its velocity and the times.
        """
        a, s, da, ds = (c.view(-1, 1, 1, 1) for c in self.coefficients(t))
        return PathSample(a * x0 + s * noise, da * x0 + ds * noise, t)
