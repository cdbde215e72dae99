"""Claim: the field is centripetal, and worst transport makes it more so.

Each experiment returns plain numbers, which the tests check and ``python -m benchmarks claims`` draws. The
experiments are ours; the claims are arXiv 2508.05461's.
"""

import math
from collections.abc import Callable, Sequence

import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch.nn.functional import normalize

from anomalib_wtflow.diagnosis.measures import centripetal_component
from anomalib_wtflow.flow.coupling import get_coupling
from benchmarks.theory.points import LINEAR, TOY_COUPLINGS, as_points


def largest_of_normals(count: int) -> float:
    """``E max(Z_1, …, Z_N)`` of N standard normals, by quadrature: N E[Z Phi(Z)^(N-1)]."""
    return quad(lambda z: count * z * norm.pdf(z) * norm.cdf(z) ** (count - 1), -12, 12)[0]


def centripetal_components(
    dimensions: Sequence[int] = (2, 8, 32, 128, 512, 2048), batch: int = 64, draws: int = 64, seed: int = 0
) -> dict[str, object]:
    """``E<u_0, x0> / ||x0||^2`` at t = 0 for data uniform on the shell, ``u_0 = eps - x0``, against ``-(1 + c)``.

    ``c = 0`` for ``independent``, ``sqrt(2 / pi) / sqrt(D)`` for ``worst_of_two`` and 1 for ``antipodal``. For the
    mini-batch couplings no closed form is known to us; since no row of an assignment beats the best of its N draws,
    ``c`` is between 0 and ``E max(Z_1 … Z_N) / sqrt(D)`` for ``worst``, and between minus that and 0 for ``optimal``.

    Args:
        dimensions: Dimensions D.
        batch: N, points of a mini-batch.
        draws: Mini-batches.
        seed: Seed.

    Returns:
        The dimensions and, by coupling, measured means, standard errors and predictions (None where there is none); and
        the bound on c for the mini-batch couplings.
    """
    torch.manual_seed(seed)
    result: dict[str, object] = {"D": list(dimensions), "batch": batch}
    closed: dict[str, Callable[[int], float]] = {
        "independent": lambda _: -1.0,
        "worst_of_two": lambda dim: -1 - math.sqrt(2 / math.pi / dim),
        "antipodal": lambda _: -2.0,
    }
    for name in TOY_COUPLINGS:
        coupling, means, errors = get_coupling(name), [], []
        for dim in dimensions:
            values = []
            for _ in range(draws):
                x0 = as_points(math.sqrt(dim) * normalize(torch.randn(batch, dim)))
                velocity = LINEAR.sample(x0, coupling(x0, torch.randn_like(x0)), torch.zeros(batch)).velocity
                values.append(centripetal_component(velocity, x0).mean())
            drawn = torch.stack(values)
            means.append(drawn.mean().item())
            errors.append(drawn.std().item() / math.sqrt(draws))
        predicted = [closed[name](dim) for dim in dimensions] if name in closed else None
        result[name] = {"mean": means, "standard_error": errors, "predicted": predicted}
    result["bound"] = [largest_of_normals(batch) / math.sqrt(dim) for dim in dimensions]
    return result
