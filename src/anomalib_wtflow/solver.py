"""Fixed-step solvers of ``dx/dt = v(x, t)``, unrolled so that they export."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow._registry import lookup

SolverName = Literal["euler", "midpoint", "rk4"]
VectorField = Callable[[Tensor, Tensor], Tensor]


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
        ValueError: If the name is unknown or there is no step.
    """

    def __init__(self, name: str = "euler", steps: int = 1) -> None:
        self.tableau = lookup(SOLVERS, "solver", name)
        if steps < 1:
            msg = f"steps is {steps}: the flow takes at least 1 step."
            raise ValueError(msg)
        self.name = name
        self.steps = steps

    def integrate(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Carry ``x`` along ``field`` from time ``start`` to ``end``.

        Args:
            field: ``v(x, t)`` with ``x`` of shape ``(N, ...)`` and ``t`` of shape ``(N,)``.
            x: Points at ``start``, ``(N, ...)``.
            start: Time at which the points are.
            end: Time to carry them to; smaller than ``start`` runs the flow backwards.

        Returns:
            The points at ``end``, of the shape of ``x``.
        """
        h = (end - start) / self.steps
        for step in range(self.steps):
            slope = torch.zeros_like(x)
            total = torch.zeros_like(x)
            for node, weight in zip(self.tableau.nodes, self.tableau.weights, strict=True):
                t = x.new_full((x.shape[0],), start + (step + node) * h)
                slope = field(x + node * h * slope if node else x, t)
                total = total + weight * slope
            x = x + h * total
        return x
