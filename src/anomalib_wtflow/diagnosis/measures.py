"""Measures of a flow: radius, centripetal component, Lipschitz constant, trajectories."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from anomalib_wtflow.flow.solver import Solver, VectorField


def radius(x: Tensor) -> Tensor:
    """``||x|| / sqrt(C)`` by position, ``(N, C, ...)`` to ``(N, ...)``; noise has about 1."""
    return x.square().mean(dim=1).sqrt()


def centripetal_component(velocity: Tensor, x: Tensor) -> Tensor:
    """``<u, x> / ||x||^2`` at each position of ``(N, C, ...)``, as ``(N, ...)`` (ours).

    -1 heads for the centre at the speed that reaches it after one unit of time, 0 is sideways, above 0 outward.
    """
    return (velocity * x).sum(dim=1) / x.square().sum(dim=1)


def trajectory(field: VectorField, x: Tensor, times: Tensor) -> Tensor:
    """Return points ``(K, N, ...)`` along ``dx/dt = v(x, t)``, one RK4 step apart.

    Args:
        field: ``v(x, t)``.
        x: Points at ``times[0]``, ``(N, ...)``.
        times: The times.
    """
    points = [x]
    for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        points.append(Solver("rk4", 1).integrate(field, points[-1], start, end))
    return torch.stack(points)


def local_lipschitz(field: VectorField, x: Tensor, t: Tensor, iterations: int = 20) -> Tensor:
    """``|| dv/dx ||_2`` of each sample, ``(N,)``: a lower bound by power iteration.

    For a field that acts on each position by itself it is the largest over the positions of a sample.

    Args:
        field: ``v(x, t)``, differentiable in ``x`` in both modes of automatic differentiation.
        x: Points, ``(N, ...)``.
        t: Times, ``(N,)``.
        iterations: Power iterations, at least 1.
    """

    def unit(z: Tensor) -> Tensor:
        return normalize(z.flatten(1), dim=1).view_as(z)

    backward = torch.func.vjp(lambda z: field(z, t), x)[1]
    direction = unit(torch.randn_like(x))
    image = torch.zeros_like(x)
    for _ in range(iterations):
        image = torch.func.jvp(lambda z: field(z, t), (x,), (direction,))[1]
        direction = unit(backward(image)[0])
    return image.flatten(1).norm(dim=1).detach()
