"""Claim: normal points end in a well at the centre, and anomalous ones escape.

Each experiment returns plain numbers, which the tests check and ``python -m benchmarks claims`` draws. The
experiments are ours; the claims are arXiv 2508.05461's.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anomalib_wtflow.anomaly_map import density_proxy
from anomalib_wtflow.diagnosis.measures import radius, trajectory
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.normalization import Whitening
from anomalib_wtflow.flow.regression import FieldTraining, TrainingPlan, fit_field
from anomalib_wtflow.flow.solver import Solver
from benchmarks.theory.log_density import log_density
from benchmarks.theory.points import DATA, LINEAR, TOY_COUPLINGS, Points, arc, auroc

PLAN = TrainingPlan(max_epochs=32, batch_size=128, learning_rate=3e-3, scheduler="cosine", averaging=0, plateau=0)
"""512 steps on 2048 points."""


def fit_toy(data: Tensor, coupling: str, seed: int) -> PointwiseField:
    """Fit a small pointwise field to points ``(N, C, 1, 1)``."""
    torch.manual_seed(seed)
    channels = data.shape[1]
    field = PointwiseField(channels, width=128 if channels > 2 else 64, depth=2)
    fit_field(FieldTraining(field, data, LINEAR, coupling, replace(PLAN, seed=seed)))
    return field


def one_step(field: PointwiseField, x0: Tensor, start_time: float) -> Tensor:
    """``y = x0 + v((1 - t_s) x0, t_s)``; at ``t_s = 0`` the paper's one-step inference."""
    with torch.no_grad():
        return x0 + field((1 - start_time) * x0, torch.full((len(x0),), start_time))


def well_and_escape(
    seeds: Sequence[int] = (0, 1, 2),
    couplings: Sequence[str] = TOY_COUPLINGS,
    data: Sequence[str] = ("arc", "subspace"),
) -> dict[str, dict[str, object]]:
    """Train on 2048 normal points, push 2048 others and 2048 anomalous ones, and compare where they end.

    Args:
        seeds: Seeds of data, network and training.
        couplings: Couplings to train with.
        data: Names in :data:`DATA`.

    Returns:
        By data set: the AUROCs of two controls without a flow, ``||x0||`` and the same after whitening by the training
        points (a Mahalanobis distance), for each seed; and, by coupling, for each seed the AUROC
        of the density proxy at ``t_s`` = 0 and 0.3 and the mean radius at which normal and anomalous points end at
        ``t_s = 0``.
    """
    result: dict[str, dict[str, object]] = {}
    for name in data:
        scores: dict[str, dict[str, list[float]]] = {
            coupling: {"auroc": [], "late_auroc": [], "normal_radius": [], "anomalous_radius": []}
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
            index = torch.zeros(2048, dtype=torch.int64)
            whitening.fit([(normal[:2048], index)])
            whitened.append(auroc(*(radius(whitening(x, index)).flatten() for x in tested)))
            for coupling in couplings:
                field = fit_toy(normal[:2048], coupling, seed)
                row = scores[coupling]
                for key, start_time in (("auroc", 0.0), ("late_auroc", 0.3)):
                    ends = [one_step(field, x, start_time) for x in tested]
                    row[key].append(auroc(*(-density_proxy(y).flatten() for y in ends)))
                    if start_time == 0:
                        row["normal_radius"].append(radius(ends[0]).mean().item())
                        row["anomalous_radius"].append(radius(ends[1]).mean().item())
        result[name] = {"control": control, "control_whitened": whitened, **scores}
    return result


def trajectories(
    couplings: Sequence[str] = ("independent", "optimal", "worst"),
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Flow of normal and anomalous points of :func:`arc` along the fields learnt under each coupling.

    Args:
        couplings: Couplings to train with.
        seed: Seed.

    Returns:
        By coupling: 60 coupled pairs ``(2, 60, 2)`` of one batch, the paths ``(K, 40, 2)`` of 40 normal and 40
        anomalous points at K times, where one step takes them ``(40, 2)``, and the AUROCs of that step's density proxy
        and of the log-density along the flow, over 2048 of each.
    """
    torch.manual_seed(seed)
    normal, anomalous = arc(4096)
    times = torch.linspace(0, 1, 21)
    result: dict[str, dict[str, object]] = {}
    for name in couplings:
        field = fit_toy(normal[:2048], name, seed)
        pairs = normal[-60:]
        row: dict[str, object] = {
            "pairs": torch.stack([pairs, get_coupling(name)(pairs, torch.randn_like(pairs))]).flatten(2).tolist(),
        }
        ends, exact = [], []
        for kind, x in (("normal", normal[2048:]), ("anomalous", anomalous[2048:])):
            with torch.no_grad():
                row[f"{kind}_path"] = trajectory(field, x[:40], times).flatten(2).tolist()
            end = one_step(field, x, 0.0)
            row[f"{kind}_end"] = end[:40].flatten(1).tolist()
            ends.append(-density_proxy(end).flatten())
            exact.append(-log_density(field, x, solver=Solver("rk4", 8)).flatten())
        row["auroc"], row["auroc_log_density"] = auroc(*ends), auroc(*exact)
        result[name] = row
    return result
