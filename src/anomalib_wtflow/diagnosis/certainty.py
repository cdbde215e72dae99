"""95 % intervals of an AUROC, a difference and a share; the band of false alarms."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import betabinom, binomtest, norm

Interval = tuple[float, float]
LEVEL = 0.95
RESAMPLES = 2000


def auroc_interval(auroc: float, normal: int, anomalous: int) -> Interval:
    """``|t - auroc| <= z sqrt(V(t))`` for m normal and n anomalous images.

    ``V(t) = t (1 - t) (1 + (N - 1) ((1 - t) / (2 - t) + t / (1 + t))) / (m n)`` with ``N = (m + n) / 2`` (Hanley and
    McNeil, Radiology 143, 1982; Newcombe's method 5, Statistics in Medicine 25, 2006). It has a width at 0 and 1 too.
    """
    z = norm.ppf((1 + LEVEL) / 2)

    def excess(t: float) -> float:
        further = ((normal + anomalous) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        return (t - auroc) ** 2 - z * z * t * (1 - t) * (1 + further) / (normal * anomalous)

    low = brentq(excess, 0, auroc - 1e-9) if auroc > 1e-9 else 0.0
    high = brentq(excess, auroc + 1e-9, 1) if auroc < 1 - 1e-9 else 1.0
    return float(low), float(high)


def mean_interval(values: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """``mean ± sqrt(sum (value - end)^2) / K``, by side (Zou and Donner, 2008)."""
    count, mean = len(values), sum(values) / len(values)
    below = math.hypot(*(value - low for value, (low, _) in zip(values, intervals, strict=True)))
    above = math.hypot(*(high - value for value, (_, high) in zip(values, intervals, strict=True)))
    return mean - below / count, mean + above / count


def share_interval(count: int, total: int) -> Interval:
    """Return Wilson's interval of a share, seen in ``count`` of ``total``."""
    ends = binomtest(count, total).proportion_ci(LEVEL, "wilson")
    return float(ends.low), float(ends.high)


def difference_interval(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Interval:
    """Return the interval of a mean difference of AUROCs, from 2000 resamples of the images.

    The pairs are what :func:`placements` gives of either score, ``(m, n)`` each, for each product.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for ours, theirs in pairs:
        m, n = ours.shape
        good = rng.multinomial(m, np.full(m, 1 / m), RESAMPLES) / m
        bad = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
        total += ((good @ (ours - theirs)) * bad).sum(axis=1) / len(pairs)
    low, high = np.quantile(total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def placements(normal: Sequence[float], anomalous: Sequence[float]) -> np.ndarray:
    """1 where a defective image scores above a good one, 1/2 if equal, ``(m, n)``."""
    good, bad = np.asarray(normal)[:, None], np.asarray(anomalous)[None]
    return (bad > good) + 0.5 * (bad == good)


def false_alarm_band(groups: Sequence[tuple[int, float, int]]) -> tuple[int, int]:
    """Return the 95 % band of the number of false alarms that the promised rate allows.

    With a threshold at the j-th largest of n calibration scores, the number among m exchangeable good images follows a
    beta-binomial law with ``j`` and ``n + 1 - j`` (Vovk, 2012; exact without ties); over groups they add up.

    Args:
        groups: For each product: good test images m, the promised rate ``j / (n + 1)``, and calibration images n.
    """
    law = np.ones(1)
    for images, rate, calibration in groups:
        exceed = round(rate * (calibration + 1))
        law = np.convolve(law, betabinom.pmf(np.arange(images + 1), images, exceed, calibration + 1 - exceed))
    below = np.cumsum(law)
    return int((below < (1 - LEVEL) / 2).sum()), int((below < (1 + LEVEL) / 2).sum())
