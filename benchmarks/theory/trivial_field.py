"""Claim: reversed Gaussian paths give trivial fields in high dimension.

Each experiment returns plain numbers, which the tests check and ``python -m benchmarks claims`` draws. The
experiments are ours; the claims are arXiv 2508.05461's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from anomalib_wtflow.flow.path import ProbabilityPath
from benchmarks.theory.oracle import EmpiricalField
from benchmarks.theory.points import arc, as_points, power_law


def trivial_field(
    dimensions: Sequence[int] = (2, 8, 32, 128, 512, 2048, 4096), t: float = 0.5, points: int = 64, seed: int = 0
) -> dict[str, object]:
    """``E||u_A - u_B|| / E||u_A||`` along the reversed Gaussian paths of a data set A: can the field tell A from B?

    Inside the shell: A on a circle and B on two lines, of radius about ``sqrt(2)`` in every D. On the shell: A and B
    uniform on the sphere of radius ``sqrt(D)``, as the normalised features of a backbone are.

    Args:
        dimensions: Dimensions D, at least 2.
        t: Time.
        points: Points in A and in B.
        seed: Seed.

    Returns:
        The dimensions, the ratios in both cases, and the exponents fitted to the dimensions from 128 on.
    """
    torch.manual_seed(seed)
    path = ProbabilityPath("gaussian", 0.01)
    circle = arc(points).normal.flatten(1).double()
    lines = torch.stack([2 * torch.rand(points) - 1, torch.randint(0, 2, (points,)) * 2.0 - 1], dim=1).double()

    def inside(dim: int) -> tuple[Tensor, Tensor]:
        first, second = (torch.zeros(points, dim, dtype=torch.float64) for _ in range(2))
        first[:, :2], second[:, :2] = circle, lines
        return first, second

    def shell(dim: int) -> tuple[Tensor, Tensor]:
        drawn = math.sqrt(dim) * normalize(torch.randn(2, points, dim, dtype=torch.float64), dim=2)
        return drawn[0], drawn[1]

    def ratio(first: Tensor, second: Tensor) -> float:
        a, b = EmpiricalField(first, path), EmpiricalField(second, path)
        source = first.repeat(max(1, 512 // points), 1)
        times = torch.full((len(source),), t, dtype=torch.float64)
        sample = path.sample(as_points(source), torch.randn_like(as_points(source)), times)
        velocity, other = a(sample.x_t, times), b(sample.x_t, times)
        return float((velocity - other).flatten(1).norm(dim=1).mean() / velocity.flatten(1).norm(dim=1).mean())

    result: dict[str, object] = {"D": list(dimensions), "t": t}
    for name, draw in (("inside", inside), ("shell", shell)):
        values = [ratio(*draw(dim)) for dim in dimensions]
        high = [(dim, value) for dim, value in zip(dimensions, values, strict=True) if dim >= 128]
        exponent = power_law(*zip(*high, strict=True)) if len(high) > 1 else math.nan
        result[name] = {"ratio": values, "exponent": exponent}
    return result
