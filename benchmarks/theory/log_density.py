"""Log-density of data under a flow: the exact counterpart of the density proxy, for analysis."""

import math

import torch
from torch import Tensor

from anomalib_wtflow.flow.solver import Solver, VectorField
from benchmarks.theory.adaptive import AdaptiveSolver


def divergence(field: VectorField, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and its divergence ``sum_c dv_c / dx_c`` at each position, by a backward pass for each element.

    Args:
        field: ``v(x, t)``.
        x: Points, ``(N, C, ...)``.
        t: Times, ``(N,)``.

    Returns:
        The velocity, of the shape of ``x``, and the divergence, ``(N, 1, ...)``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = field(x, t)
        flat = velocity.flatten(1)
        diagonal = torch.zeros_like(flat)
        for k in range(flat.shape[1]):
            (gradient,) = torch.autograd.grad(flat[:, k].sum(), x, retain_graph=True)
            diagonal[:, k] = gradient.flatten(1)[:, k]
    return velocity.detach(), diagonal.view_as(x).sum(1, keepdim=True)


def log_density(
    field: VectorField, x: Tensor, start: float = 0.0, solver: Solver | AdaptiveSolver | None = None
) -> Tensor:
    """``log p_start(x) = log N(x(1); 0, I) + int_start^1 div v(x(t), t) dt`` along ``dx/dt = v(x, t)``.

    The instantaneous change of variables of continuous normalising flows (Chen et al., 2018; its use here is ours).
    A sample's log-density is the sum over its positions. Where the field acts on each position by itself, each value
    is that position's own log-density.

    Args:
        field: ``v(x, t)``, differentiable in ``x``.
        x: Points at time ``start``, ``(N, C, ...)``.
        start: Time at which the points are.
        solver: Any solver; None for :class:`benchmarks.theory.adaptive.AdaptiveSolver`.

    Returns:
        ``(N, 1, ...)``, in nats.
    """

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        return torch.cat(divergence(field, state[:, :-1], t), dim=1)

    state = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    state = (solver or AdaptiveSolver()).integrate(augmented, state, start, 1.0)
    y, integral = state[:, :-1], state[:, -1:]
    return integral - 0.5 * (y.square() + math.log(2 * math.pi)).sum(1, keepdim=True)
