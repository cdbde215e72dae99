"""Claim: normal points end in a well at the centre, and anomalous ones escape.

Each experiment returns plain numbers, which the tests check and ``anomalib-wtflow diagnose --toy`` draws. The
experiments are ours; the claims are arXiv 2508.05461's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anomalib_wtflow.anomaly_map import density_proxy
from anomalib_wtflow.flow.coupling import get_coupling
from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.normalization import Whitening
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import fit_field
from anomalib_wtflow.theory.diagnostics import radius, trajectory
from anomalib_wtflow.theory.points import DATA, LINEAR, TOY_COUPLINGS, Points, arc, auroc


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
