"""Marginal vector fields in closed form: exact answers for tests, figures and trained networks.

The marginal field of a probability path is ``u_t(x) = E[u_t(X_t | X_0) | X_t = x]`` (arXiv 2508.05461v3); that it has a
closed form for a finite data set and for Gaussian data is well known, and used here by us.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.registry import lookup

OracleCoupling = Literal["independent", "worst_of_two"]
MAX_PAIRS = 1 << 24


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.ndim - 1))


def _check_times(path: ProbabilityPath, s: Tensor, t: Tensor) -> None:
    if (s <= 0).any():
        msg = (
            f"The exact field of the {path.name} path is not defined at t = {t[s <= 0][0].item():g}, where its noise "
            "level is 0: ask for t > 0, or take the gaussian path with s_min > 0."
        )
        raise ValueError(msg)


class EmpiricalField:
    """``u_t(x) = sum_i w_i u_t(x | x_i)``, ``w_i ∝ exp(-||x - a_t x_i||^2 / (2 s_t^2))``: the field of a finite set.

    With ``u_t(x | x_i) = (s'_t / s_t)(x - a_t x_i) + a'_t x_i`` it is ``(s'/s) x + (a' - a s'/s) E[x0 | x]``. The
    weights are a softmax, so that no exponential over- or underflows. Source: ours, from arXiv 2508.05461v3's path.

    Under the ``worst_of_two`` coupling of :mod:`anomalib_wtflow.flow.coupling` the noise of ``x_i`` is a normal cut to
    the half-space ``<eps, x_i> <= 0``, so a data point has weight only where ``<x - a_t x_i, x_i> <= 0``, and the rest
    holds as it stands (ours). Where no data point has weight, no path passes: the field is NaN, the log-density -inf.

    Args:
        data: The data set, ``(M, ...)``.
        path: Any affine path.
        coupling: ``independent`` or ``worst_of_two``, the couplings whose noise has a known law given a data point.

    Raises:
        ValueError: If the data set is empty or the coupling has no closed form here.
    """

    def __init__(self, data: Tensor, path: ProbabilityPath, coupling: OracleCoupling = "independent") -> None:
        if len(data) == 0:
            msg = "The data set of the exact field is empty: give at least 1 point."
            raise ValueError(msg)
        self._half = lookup({"independent": False, "worst_of_two": True}, "coupling with an exact field", coupling)
        self.data = data.flatten(1)
        self.path = path

    def _logits(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ``log p(x | x_i)`` up to the Gaussian's normalisation, ``(N, M)``, for flat points ``(N, D)``."""
        a, s, _, _ = self.path.coefficients(t)
        _check_times(self.path, s, t)
        # ||x - a x_i|| from differences: the expansion into inner products loses all digits where s is small.
        distance = torch.cdist(x[:, None], a[:, None, None] * self.data, compute_mode="donot_use_mm_for_euclid_dist")
        logits = -(distance[:, 0] / s[:, None]).square() / 2
        if self._half:
            square = self.data.square().sum(1)
            logits = logits + math.log(2) * (square > 0)
            logits = logits.masked_fill(x @ self.data.T > a[:, None] * square, -math.inf)
        return logits

    def weights(self, x: Tensor, t: Tensor) -> Tensor:
        """Posterior weight of each data point at points ``(N, ...)`` and times ``(N,)`` or ``(1,)``, as ``(N, M)``.

        Raises:
            ValueError: If the path has no noise at one of the times.
        """
        x, t = x.flatten(1), t.expand(len(x))
        size = max(1, MAX_PAIRS // (len(self.data) * x.shape[1]))
        return torch.cat([self._logits(*part).softmax(1) for part in zip(x.split(size), t.split(size), strict=True)])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at points ``(N, ...)`` and times ``(N,)`` or ``(1,)``, of the shape of ``x``.

        Raises:
            ValueError: If the path has no noise at one of the times.
        """
        mean = (self.weights(x, t) @ self.data).view_as(x)
        a, s, da, ds = (_per_sample(c, x) for c in self.path.coefficients(t))
        return ds / s * (x - a * mean) + da * mean

    def jacobian(self, x: Tensor, t: Tensor) -> Tensor:
        """``du/dx = (s'/s) I + (a' - a s'/s)(a / s^2) Cov[x0 | x]``, as ``(N, D, D)``; symmetric.

        It has no term for the edge of a half-space under ``worst_of_two``, where the field jumps.

        Args:
            x: Points, ``(N, ...)`` with D elements each.
            t: Times, ``(N,)``.

        Returns:
            The Jacobian; its largest eigenvalue by modulus is the local Lipschitz constant.

        Raises:
            ValueError: If the path has no noise at one of the times.
        """
        weights = self.weights(x, t)
        centred = self.data - (weights @ self.data)[:, None]
        covariance = (weights[..., None] * centred).mT @ centred
        a, s, da, ds = (c.view(-1, 1, 1) for c in self.path.coefficients(t))
        identity = torch.eye(self.data.shape[1], dtype=covariance.dtype, device=covariance.device)
        return ds / s * identity + (da - a * ds / s) * (a / s**2) * covariance

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """``log p_t(x)``, ``p_t = mean_i N(a_t x_i, s_t^2 I)``, cut to the half-spaces under ``worst_of_two``.

        Args:
            x: Points, ``(N, ...)``.
            t: Times, ``(N,)``.

        Returns:
            ``(N,)``, in nats.

        Raises:
            ValueError: If the path has no noise at one of the times.
        """
        x = x.flatten(1)
        s = self.path.coefficients(t).s
        normalisation = math.log(len(self.data)) + x.shape[1] * (s.log() + math.log(2 * math.pi) / 2)
        return self._logits(x, t).logsumexp(1) - normalisation


class GaussianField:
    """``u_t(x) = a' m + (a a' S + s s' I)(a^2 S + s^2 I)^-1 (x - a m)``: data ``N(m, S)`` and independent noise.

    The flow is linear along the eigenvectors of S: ``x(t) - a_t m`` grows as ``sqrt(v_t)``, ``v_t = a_t^2 l + s_t^2``.
    Source: ours, from arXiv 2508.05461v3's path.

    Args:
        mean: m, ``(D,)``.
        covariance: S, ``(D, D)``, positive semi-definite.
        path: Any affine path.

    Raises:
        ValueError: If S has a negative eigenvalue.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, path: ProbabilityPath) -> None:
        self.mean = mean
        self.values, self.vectors = torch.linalg.eigh(covariance)
        if self.values[0] < -1e-6 * self.values[-1].abs():
            msg = f"The covariance has the eigenvalue {self.values[0].item():g}: give a positive semi-definite matrix."
            raise ValueError(msg)
        self.values = self.values.clamp(min=0)
        self.path = path

    def _variance(self, t: Tensor) -> Tensor:
        a, s, _, _ = self.path.coefficients(t)
        if self.values[0] == 0:
            _check_times(self.path, s, t)
        return a[:, None] ** 2 * self.values + s[:, None] ** 2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity at points ``(N, ...)`` and times ``(N,)`` or ``(1,)``, of the shape of ``x``.

        Raises:
            ValueError: If S is singular and the path has no noise at one of the times.
        """
        variance = self._variance(t)
        a, s, da, ds = (c[:, None] for c in self.path.coefficients(t))
        rate = (a * da * self.values + s * ds) / variance
        centred = (x.flatten(1) - a * self.mean) @ self.vectors
        return (da * self.mean + (rate * centred) @ self.vectors.T).view_as(x)

    def transport(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Carry points ``(N, ...)`` along the flow from times ``start`` to times ``end``, each ``(N,)``, exactly.

        Raises:
            ValueError: If S is singular and the path has no noise at one of the times.
        """
        scale = (self._variance(end) / self._variance(start)).sqrt()
        centred = (x.flatten(1) - self.path.coefficients(start).a[:, None] * self.mean) @ self.vectors
        return (self.path.coefficients(end).a[:, None] * self.mean + (scale * centred) @ self.vectors.T).view_as(x)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """``log N(x; a_t m, a_t^2 S + s_t^2 I)`` at points ``(N, ...)`` and times ``(N,)``, as ``(N,)``, in nats.

        Raises:
            ValueError: If S is singular and the path has no noise at one of the times.
        """
        variance = self._variance(t)
        centred = (x.flatten(1) - self.path.coefficients(t).a[:, None] * self.mean) @ self.vectors
        return -(centred**2 / variance + variance.log() + math.log(2 * math.pi)).sum(1) / 2
