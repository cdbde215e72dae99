"""Solvers of ``dx/dt = v(x, t)``: unrolled Runge-Kutta steps of fixed size, for export."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow.flow.registry import lookup

VectorField = Callable[[Tensor, Tensor], Tensor]
"""``v(x, t)`` of points ``(N, ...)`` at times ``(N,)``, or ``(1,)`` for one time for all."""


class Tableau(NamedTuple):
    """Explicit Runge-Kutta tableau whose stage i depends on stage i - 1 only.

    ``nodes[i]`` is where in the step stage i is evaluated, and how far along the previous stage's slope.
    """

    nodes: Sequence[float]
    weights: Sequence[float]


SOLVERS: dict[str, Tableau] = {
    "euler": Tableau((0.0,), (1.0,)),
    "midpoint": Tableau((0.0, 1 / 2), (0.0, 1.0)),
    "rk4": Tableau((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


class Solver:
    """``x_{k+1} = x_k + h sum_i b_i v(x_k + h c_i k_{i-1}, t_k + c_i h)`` with K equal steps h.

    One Euler step over the whole interval is the one-step inference of arXiv 2508.05461.

    Args:
        name: One of :data:`SOLVERS`.
        steps: Number of equal steps K >= 1.

    Raises:
        WTFlowError: If the name is unknown.
    """

    def __init__(self, name: str = "euler", steps: int = 1) -> None:
        self.tableau = lookup(SOLVERS, "solver", name)
        self.steps = steps

    def integrate(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Carry ``x`` along ``field`` from time ``start`` to ``end``.

        Args:
            field: ``v(x, t)`` with ``x`` of shape ``(N, ...)`` and ``t`` of shape ``(1,)``.
            x: Points at ``start``, ``(N, ...)``.
            start: Time at which the points are.
            end: Time to carry them to; smaller than ``start`` runs the flow backwards.

        Returns:
            The points at ``end``, of the shape of ``x``.
        """
        return x + (end - start) * self.mean_velocity(field, x, start, end)

    def mean_velocity(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Return ``(x(end) - x(start)) / (end - start)``; arguments as for :meth:`integrate`."""
        h = (end - start) / self.steps
        total: Tensor | None = None
        for step in range(self.steps):
            slopes: list[Tensor] = []
            for node in self.tableau.nodes:
                # One time for all samples, so that what depends on it alone is a constant of an exported graph.
                t = x.new_full((1,), start + (step + node) * h)
                slopes.append(field(x + node * h * slopes[-1] if node else x, t))
            terms = [s if w == 1 else w * s for w, s in zip(self.tableau.weights, slopes, strict=True) if w]
            slope = reduce(torch.add, terms)
            total = slope if total is None else total + slope
            if step + 1 < self.steps:
                x = x + h * slope
        assert total is not None
        return total if self.steps == 1 else total / self.steps
