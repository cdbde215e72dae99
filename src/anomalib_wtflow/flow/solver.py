"""Solvers of ``dx/dt = v(x, t)``: unrolled fixed steps, which export, and torchdiffeq's adaptive ones, for analysis."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from anomalib_wtflow.errors import WTFlowError
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
"""Solvers of a fixed number of steps."""

ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""torchdiffeq's explicit solvers of adaptive step size, by torchdiffeq's names."""

SOLVER_NAMES = dict.fromkeys((*SOLVERS, *ADAPTIVE_SOLVERS))


class ODESolver(Protocol):
    """What the model and the diagnostics need of a solver."""

    name: str
    exportable: bool

    def integrate(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Carry ``x`` along ``field`` from time ``start`` to ``end``."""
        ...

    def mean_velocity(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Return ``(x(end) - x(start)) / (end - start)``."""
        ...


class Solver:
    """``x_{k+1} = x_k + h sum_i b_i v(x_k + h c_i k_{i-1}, t_k + c_i h)`` with K equal steps h.

    One Euler step over the whole interval is the one-step inference of arXiv 2508.05461.

    Args:
        name: One of :data:`SOLVERS`.
        steps: Number of equal steps K >= 1.

    Raises:
        WTFlowError: If the name is unknown.
    """

    exportable = True

    def __init__(self, name: str = "euler", steps: int = 1) -> None:
        self.tableau = lookup(SOLVERS, "solver", name)
        self.name = name
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
        """Return ``(x(end) - x(start)) / (end - start)``, of the shape of ``x``; arguments as for :meth:`integrate`."""
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


class AdaptiveSolver:
    """torchdiffeq's solvers of adaptive step size: ``error <= atol + rtol |x|`` at each step. For analysis in Python.

    The step is chosen for the whole batch, so a result may depend on its companions, within the tolerance.

    Args:
        name: One of :data:`ADAPTIVE_SOLVERS`.
        rtol: Relative tolerance, above 0.
        atol: Absolute tolerance, above 0.

    Raises:
        WTFlowError: If the name is unknown or a tolerance is not positive.
    """

    exportable = False

    def __init__(self, name: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-6) -> None:
        self.name = lookup({solver: solver for solver in ADAPTIVE_SOLVERS}, "adaptive solver", name)
        if not (rtol > 0 and atol > 0):
            msg = f"rtol is {rtol} and atol {atol}: choose tolerances above 0."
            raise WTFlowError(msg)
        self.rtol = rtol
        self.atol = atol

    def integrate(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Carry ``x`` along ``field`` from time ``start`` to ``end``, as :meth:`Solver.integrate` does.

        Raises:
            WTFlowError: If the model is being exported.
        """
        if torch.compiler.is_compiling():
            raise WTFlowError(not_exportable(self.name))
        from torchdiffeq import odeint  # a fifth of the time that the plugin adds to every start of anomalib

        times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
        return odeint(
            lambda t, z: field(z, t.expand(len(z))),
            x,
            times,
            rtol=self.rtol,
            atol=self.atol,
            method=self.name,
            # A step that ends at the end: torchdiffeq would otherwise interpolate, which costs dopri8 three digits.
            options={"step_t": times[1:]},
        )[-1]

    def mean_velocity(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Return ``(x(end) - x(start)) / (end - start)``."""
        return (self.integrate(field, x, start, end) - x) / (end - start)


def not_exportable(name: str) -> str:
    """Say why an adaptive solver does not export, and what does."""
    return (
        f"Solver '{name}' chooses its steps from the data and does not export: "
        f"give the model one of {', '.join(SOLVERS)}, as --model.overrides.solver."
    )


def get_solver(name: str = "euler", steps: int = 1) -> Solver | AdaptiveSolver:
    """Build a solver by name; ``steps`` has no effect on the adaptive ones.

    Raises:
        WTFlowError: If the name is unknown.
    """
    lookup(SOLVER_NAMES, "solver", name)
    return AdaptiveSolver(name) if name in ADAPTIVE_SOLVERS else Solver(name, steps)
