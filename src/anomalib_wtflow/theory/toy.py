"""Small experiments with known answers: the paper's claims, measured on data that we draw.

Each experiment returns plain numbers, which the tests check and ``anomalib-wtflow diagnose --toy`` draws. Points are
feature maps of one position, ``(N, C, 1, 1)``. The experiments are ours; the claims are arXiv 2508.05461's.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional.classification import binary_auroc

from anomalib_wtflow.anomaly_map import density_proxy
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.normalization import Whitening
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import fit_field
from anomalib_wtflow.theory.diagnostics import centripetal_component, radius, trajectory
from anomalib_wtflow.theory.oracle import EmpiricalField, GaussianField

LINEAR = ProbabilityPath("linear")
TOY_COUPLINGS = ("independent", "optimal", "worst", "worst_of_two", "antipodal")


class Points(NamedTuple):
    """Normal and anomalous points, each ``(N, C, 1, 1)``, whose norms alone tell nothing."""

    normal: Tensor
    anomalous: Tensor


def _points(flat: Tensor) -> Tensor:
    return flat[:, :, None, None]


def arc(count: int) -> Points:
    """Points near the circle of radius ``sqrt(2)``: the normal ones on its right half, the anomalous ones opposite."""

    def on_circle(angle: Tensor) -> Tensor:
        circle = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=1)
        return _points(circle + 0.05 * torch.randn(len(angle), 2))

    spread = math.pi * (torch.rand(2, count) - 0.5)
    return Points(on_circle(spread[0]), on_circle(0.8 * spread[1] + math.pi))


def subspace(count: int, channels: int = 128, rank: int = 16) -> Points:
    """Points on the sphere of radius ``sqrt(C)``, near a subspace: 0.2 of off-plane noise if normal, 0.3 if anomalous.

    The noise is relative to the part in the plane, before the point is brought to the sphere.
    """
    basis = torch.linalg.qr(torch.randn(channels, rank)).Q

    def near_plane(noise: float) -> Tensor:
        inside = torch.randn(count, rank) @ basis.T / math.sqrt(rank)
        return _points(math.sqrt(channels) * normalize(inside + noise * torch.randn(count, channels) / channels**0.5))

    return Points(near_plane(0.2), near_plane(0.3))


DATA: dict[str, Callable[[int], Points]] = {"arc": arc, "subspace": subspace}


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """Probability that an anomalous score exceeds a normal one."""
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))]).int()
    return binary_auroc(torch.cat([normal, anomalous]), labels).item()


def power_law(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of ``y ~ x^p``: the slope of the least-squares line through the logarithms."""
    logs = torch.tensor([x, y], dtype=torch.float64).log()
    centred = logs - logs.mean(dim=1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred[0].square().sum())


# The singularity at the initial time ---------------------------------------------------------------------------------


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
    data = _points(math.sqrt(dim) * normalize(torch.randn(points, dim, dtype=torch.float64)))
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


# The trivial field ---------------------------------------------------------------------------------------------------


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
        sample = path.sample(_points(source), torch.randn_like(_points(source)), times)
        velocity, other = a(sample.x_t, times), b(sample.x_t, times)
        return float((velocity - other).flatten(1).norm(dim=1).mean() / velocity.flatten(1).norm(dim=1).mean())

    result: dict[str, object] = {"D": list(dimensions), "t": t}
    for name, draw in (("inside", inside), ("shell", shell)):
        values = [ratio(*draw(dim)) for dim in dimensions]
        high = [(dim, value) for dim, value in zip(dimensions, values, strict=True) if dim >= 128]
        exponent = power_law(*zip(*high, strict=True)) if len(high) > 1 else math.nan
        result[name] = {"ratio": values, "exponent": exponent}
    return result


# The centripetal component -------------------------------------------------------------------------------------------


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
                x0 = _points(math.sqrt(dim) * normalize(torch.randn(batch, dim)))
                velocity = LINEAR.sample(x0, coupling(x0, torch.randn_like(x0)), torch.zeros(batch)).velocity
                values.append(centripetal_component(velocity, x0).mean())
            drawn = torch.stack(values)
            means.append(drawn.mean().item())
            errors.append(drawn.std().item() / math.sqrt(draws))
        predicted = [closed[name](dim) for dim in dimensions] if name in closed else None
        result[name] = {"mean": means, "standard_error": errors, "predicted": predicted}
    result["bound"] = [largest_of_normals(batch) / math.sqrt(dim) for dim in dimensions]
    return result


# The well and the escape ---------------------------------------------------------------------------------------------


def fit_toy(data: Tensor, coupling: str, steps: int = 500, path: ProbabilityPath = LINEAR) -> PointwiseField:
    """Fit a small pointwise field to points ``(N, C, 1, 1)``, in batches of 128."""
    channels = data.shape[1]
    field = PointwiseField(channels, width=128 if channels > 2 else 64, depth=2)
    fit_field(field, data, path, get_coupling(coupling), steps, batch_size=128, learning_rate=3e-3)
    return field


def one_step(field: PointwiseField, x0: Tensor, start_time: float) -> Tensor:
    """``y = x0 + v((1 - t_s) x0, t_s)``; at ``t_s = 0`` the paper's one-step inference."""
    with torch.no_grad():
        return x0 + field((1 - start_time) * x0, torch.full((len(x0),), start_time))


def well_and_escape(
    seeds: Sequence[int] = (0, 1, 2),
    couplings: Sequence[str] = TOY_COUPLINGS,
    data: Sequence[str] = ("arc", "subspace"),
    progress: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, object]]:
    """Train on 2048 normal points, push 2048 others and 2048 anomalous ones, and compare where they end.

    Args:
        seeds: Seeds of data, network and training.
        couplings: Couplings to train with.
        data: Names in :data:`DATA`.
        progress: Called after each training.

    Returns:
        By data set: the AUROCs of two controls without a flow, ``||x0||`` and the same after whitening by the training
        points (a Mahalanobis distance), for each seed; and, by coupling, for each seed the AUROC
        of the density proxy at ``t_s`` = 0 and 0.3 and the mean radius at which normal and anomalous points end at
        ``t_s = 0``.
    """
    result: dict[str, dict[str, object]] = {}
    for name in data:
        scores: dict[str, dict[str, list[float]]] = {
            coupling: {"auroc": [], "auroc_start_0.3": [], "normal_radius": [], "anomalous_radius": []}
            for coupling in couplings
        }
        control: list[float] = []
        whitened: list[float] = []
        for seed in seeds:
            torch.manual_seed(seed)
            normal, anomalous = DATA[name](4096)
            tested = Points(normal[2048:], anomalous[2048:])
            control.append(auroc(*(radius(x).flatten() for x in tested)))
            whitening = Whitening(normal.shape[1])
            whitening.update(normal[:2048])
            whitening.finalize()
            whitened.append(auroc(*(radius(whitening(x)).flatten() for x in tested)))
            for coupling in couplings:
                torch.manual_seed(seed)
                field = fit_toy(normal[:2048], coupling)
                row = scores[coupling]
                for key, start_time in (("auroc", 0.0), ("auroc_start_0.3", 0.3)):
                    ends = [one_step(field, x, start_time) for x in tested]
                    row[key].append(auroc(*(-density_proxy(y).flatten() for y in ends)))
                    if start_time == 0:
                        row["normal_radius"].append(radius(ends[0]).mean().item())
                        row["anomalous_radius"].append(radius(ends[1]).mean().item())
                progress()
        result[name] = {"control": control, "control_whitened": whitened, **scores}
    return result


def trajectories(
    couplings: Sequence[str] = ("independent", "optimal", "worst"),
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, object]]:
    """Flow of normal and anomalous points of :func:`arc` along the fields learnt under each coupling.

    Args:
        couplings: Couplings to train with.
        seed: Seed.
        progress: Called after each training.

    Returns:
        By coupling: 60 coupled pairs ``(2, 60, 2)`` of one batch, the paths ``(K, 40, 2)`` of 40 normal and 40
        anomalous points at K times, where one step takes them ``(40, 2)``, and the AUROC of that step's end over 2048
        of each.
    """
    torch.manual_seed(seed)
    normal, anomalous = arc(4096)
    times = torch.linspace(0, 1, 41)
    result: dict[str, dict[str, object]] = {}
    for name in couplings:
        torch.manual_seed(seed)
        field = fit_toy(normal[:2048], name)
        pairs = normal[-60:]
        row: dict[str, object] = {
            "pairs": torch.stack([pairs, get_coupling(name)(pairs, torch.randn_like(pairs))]).flatten(2).tolist(),
        }
        ends = []
        for kind, x in (("normal", normal[2048:]), ("anomalous", anomalous[2048:])):
            with torch.no_grad():
                row[f"{kind}_path"] = trajectory(field, x[:40], times).flatten(2).tolist()
            end = one_step(field, x, 0.0)
            row[f"{kind}_end"] = end[:40].flatten(1).tolist()
            ends.append(-density_proxy(end).flatten())
        row["auroc"] = auroc(ends[0], ends[1])
        result[name] = row
        progress()
    return result
