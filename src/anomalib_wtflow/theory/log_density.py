"""Log-density of data under a flow: the exact counterpart of the density proxy, for analysis."""

from typing import Literal

import torch
from torch import Tensor

from anomalib_wtflow.flow.solver import AdaptiveSolver, ODESolver, VectorField

DivergenceName = Literal["exact", "hutchinson"]


def divergence(field: VectorField, x: Tensor, t: Tensor, probes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Velocity and its divergence ``sum_c dv_c / dx_c`` at each position.

    Exact: one backward pass for each of the D elements of a sample. Hutchinson: ``mean_z sum_c z_c (J^T z)_c``, one
    pass for each probe z with independent entries of mean 0 and variance 1; unbiased at each position. (Grathwohl et
    al., 2019; its use here is ours.)

    Args:
        field: ``v(x, t)``.
        x: Points, ``(N, C, ...)``.
        t: Times, ``(N,)``.
        probes: Probes, ``(K, N, C, ...)``; None for the exact divergence.

    Returns:
        The velocity, of the shape of ``x``, and the divergence, ``(N, 1, ...)``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = field(x, t)
        if not velocity.requires_grad:  # a field that does not depend on x
            return velocity, torch.zeros_like(x[:, :1])
        if probes is None:
            flat = velocity.flatten(1)
            diagonal = torch.zeros_like(flat)
            for k in range(flat.shape[1]):
                (gradient,) = torch.autograd.grad(flat[:, k].sum(), x, retain_graph=True)
                diagonal[:, k] = gradient.flatten(1)[:, k]
            total = diagonal.view_as(x).sum(1, keepdim=True)
        else:
            products = [z * torch.autograd.grad(velocity, x, z, retain_graph=True)[0] for z in probes]
            total = torch.stack(products).mean(0).sum(1, keepdim=True)
    return velocity.detach(), total.detach()


def log_density(
    field: VectorField,
    x: Tensor,
    start: float = 0.0,
    end: float = 1.0,
    method: DivergenceName = "exact",
    probes: int = 1,
    solver: ODESolver | None = None,
) -> Tensor:
    """``log p_start(x) = log N(x(end); 0, I) + int_start^end div v(x(t), t) dt`` along ``dx/dt = v(x, t)``.

    The instantaneous change of variables of continuous normalising flows (Chen et al., 2018; its use here is ours).
    A sample's log-density is the sum over its positions. Where the field acts on each position by itself, each value
    is that position's own log-density, and it pays to give the positions as samples ``(N H W, C, 1, 1)``.

    Args:
        field: ``v(x, t)``, differentiable in ``x``.
        x: Points at time ``start``, ``(N, C, ...)``.
        start: Time at which the points are.
        end: Time at which the flow's density is the standard Gaussian.
        method: ``exact`` or ``hutchinson`` divergence; the second draws its Rademacher probes once, so that the solver
            sees one ODE.
        probes: Probes of the second.
        solver: Any solver; None for :class:`anomalib_wtflow.flow.solver.AdaptiveSolver`.

    Returns:
        ``(N, 1, ...)``, in nats.

    Raises:
        ValueError: If the method is unknown or there is no probe.
        RuntimeError: If the solver finds no step within its tolerance.
    """
    if method not in ("exact", "hutchinson"):
        msg = f"Unknown divergence '{method}': choose one of exact, hutchinson."
        raise ValueError(msg)
    if probes < 1:
        msg = f"probes is {probes}: Hutchinson's divergence needs at least 1."
        raise ValueError(msg)
    signs = None
    if method == "hutchinson":
        signs = torch.randint(0, 2, (probes, *x.shape), device=x.device).to(x.dtype) * 2 - 1

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        return torch.cat(divergence(field, state[:, :-1], t, signs), dim=1)

    state = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    state = (solver or AdaptiveSolver()).integrate(augmented, state, start, end)
    y, integral = state[:, :-1], state[:, -1:]
    log_normal = -0.5 * (y.square() + torch.log(torch.tensor(2 * torch.pi))).sum(1, keepdim=True)
    return log_normal + integral
