"""Couplings: which noise each data point is carried to.

Every coupling maps ``(x0, noise)``, both ``(N, C, H, W)``, to the coupled noise of the same shape. The transport cost
is ``||x0 - eps||^2``; with the norms fixed, its maximum is the minimum of ``<x0, eps>``. Worst transport is
arXiv 2508.05461's; the realisations are ours.
"""

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.registry import lookup


def _assign(x0: Tensor, noise: Tensor, maximize: bool) -> Tensor:
    """Permute the noise over the batch for the largest or smallest ``sum_i <x_i, eps_i>``."""
    inner = (x0.flatten(1) @ noise.flatten(1).T).detach().float().cpu()
    if not inner.isfinite().all():
        msg = "The features or the noise hold NaN or infinite values: check the weights file and the images."
        raise WTFlowError(msg)
    columns = torch.from_numpy(linear_sum_assignment(inner.numpy(), maximize=maximize)[1])
    return noise[columns.to(noise.device)]


def independent(x0: Tensor, noise: Tensor) -> Tensor:
    """``eps`` as drawn: plain time-reversed flow matching."""
    del x0
    return noise


def optimal(x0: Tensor, noise: Tensor) -> Tensor:
    """``argmin_pi sum_i ||x_i - eps_pi(i)||^2``: mini-batch optimal transport."""
    return _assign(x0, noise, maximize=True)


def worst(x0: Tensor, noise: Tensor) -> Tensor:
    """``argmax_pi sum_i ||x_i - eps_pi(i)||^2``: mini-batch worst transport."""
    return _assign(x0, noise, maximize=False)


def worst_of_two(x0: Tensor, noise: Tensor) -> Tensor:
    """``-sign<x0, eps> eps`` at each position: the farther of ``eps`` and ``-eps``.

    Given ``x0``, the coupled noise is a half-normal along ``-x0`` and standard normal across it. Over data whose
    directions are symmetric its marginal stays N(0, I); over one-sided data it does not.
    """
    toward = (x0 * noise).sum(dim=1, keepdim=True) > 0
    return torch.where(toward, -noise, noise)


def antipodal(x0: Tensor, noise: Tensor) -> Tensor:
    """``-sqrt(C) x0 / ||x0||`` at each position: deterministic, on the sphere of the noise.

    The marginal is that of the reflected directions of the data, not a Gaussian. A zero vector stays zero.
    """
    del noise
    radius = x0.shape[1] ** 0.5
    return -radius * torch.nn.functional.normalize(x0, dim=1)


Coupling = Callable[[Tensor, Tensor], Tensor]

COUPLINGS: dict[str, Coupling] = {
    "independent": independent,
    "optimal": optimal,
    "worst": worst,
    "worst_of_two": worst_of_two,
    "antipodal": antipodal,
}

BATCH_COUPLINGS = frozenset({"optimal", "worst"})
"""Couplings that rearrange noise between the images of a batch, and so do nothing to a batch of one."""


def get_coupling(name: str) -> Coupling:
    """Return a coupling by name.

    Raises:
        WTFlowError: If the name is unknown.
    """
    return lookup(COUPLINGS, "coupling", name)
