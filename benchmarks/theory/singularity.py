"""Claim: linear paths are singular at the initial time.

Each experiment returns plain numbers, which the tests check and ``python -m benchmarks claims`` draws. The
experiments are ours; the claims are arXiv 2508.05461's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from anomalib_wtflow.flow.coupling import get_coupling
from benchmarks.theory.oracle import EmpiricalField, GaussianField
from benchmarks.theory.points import LINEAR, as_points, power_law


def lipschitz_growth(dim: int = 8, points: int = 32, seed: int = 0) -> dict[str, dict[str, object]]:
    """Lipschitz constant of the exact linear rFM field at points of its paths, as ``t -> 0``.

    Finite data, independent and ``worst_of_two``: the norm of :meth:`EmpiricalField.jacobian`, median over the points.
    Gaussian data: the largest rate of the linear field, for a covariance of full rank and one of rank 2. ``antipodal``
    (worst transport onto the sphere is deterministic): largest ``||u_i - u_j|| / ||x_i - x_j||`` over all pairs.

    Args:
        dim: Dimension of the data.
        points: Size of the finite data set.
        seed: Seed.

    Returns:
        By case: times, Lipschitz constants, and the exponent fitted to the times up to 0.03.
    """
    torch.manual_seed(seed)
    data = as_points(math.sqrt(dim) * normalize(torch.randn(points, dim, dtype=torch.float64)))
    times = torch.logspace(-3, math.log10(0.9), 25, dtype=torch.float64)
    full = torch.diag(torch.linspace(0.5, 1.5, dim, dtype=torch.float64))
    flat = torch.diag(torch.tensor([1.0] * 2 + [0.0] * (dim - 2), dtype=torch.float64))
    mean = torch.zeros(dim, dtype=torch.float64)
    identity = torch.eye(dim, dtype=torch.float64)

    def finite(coupling: str) -> Callable[[Tensor], Tensor]:
        field = EmpiricalField(data, LINEAR, coupling)  # type: ignore[arg-type]

        def constant(t: Tensor) -> Tensor:
            sample = LINEAR.sample(data, get_coupling(coupling)(data, torch.randn_like(data)), t.expand(points))
            return torch.linalg.matrix_norm(field.jacobian(sample.x_t, sample.t), ord=2).median()

        return constant

    def gaussian(covariance: Tensor) -> Callable[[Tensor], Tensor]:
        field = GaussianField(mean, covariance, LINEAR)
        return lambda t: torch.linalg.matrix_norm(field(identity, t.expand(dim)), ord=2)

    def antipodal(t: Tensor) -> Tensor:
        sample = LINEAR.sample(data, get_coupling("antipodal")(data, data), t.expand(points))
        return torch.nan_to_num(torch.pdist(sample.velocity.flatten(1)) / torch.pdist(sample.x_t.flatten(1))).max()

    cases: dict[str, Callable[[Tensor], Tensor]] = {
        "finite data, independent": finite("independent"),
        "finite data, worst_of_two": finite("worst_of_two"),
        "Gaussian data in a plane, independent": gaussian(flat),
        "Gaussian data of full rank, independent": gaussian(full),
        "antipodal": antipodal,
    }
    early = int((times <= 0.03).sum())
    result: dict[str, dict[str, object]] = {}
    for name, constant in cases.items():
        values = [constant(t).item() for t in times]
        exponent = power_law(times[:early].tolist(), values[:early])
        result[name] = {"t": times.tolist(), "lipschitz": values, "exponent": exponent}
    return result
