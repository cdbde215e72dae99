"""torchdiffeq's solvers of adaptive step size, to judge what fixed steps give."""

import torch
from torch import Tensor
from torchdiffeq import odeint

from anomalib_wtflow.flow.solver import VectorField


class AdaptiveSolver:
    """``error <= atol + rtol |x|`` at each step.

    Args:
        name: One of torchdiffeq's adaptive solvers.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """

    def __init__(self, name: str = "dopri5", rtol: float = 1e-5, atol: float = 1e-6) -> None:
        self.name, self.rtol, self.atol = name, rtol, atol

    def integrate(self, field: VectorField, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Carry ``x`` along ``field`` from time ``start`` to ``end``."""
        times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
        # A step that ends at the end: torchdiffeq would otherwise interpolate, which costs dopri8 three digits.
        return odeint(
            lambda t, z: field(z, t.expand(len(z))),
            x,
            times,
            rtol=self.rtol,
            atol=self.atol,
            method=self.name,
            options={"step_t": times[1:]},
        )[-1]
