"""Intervals against published examples, closed forms and simulation."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import norm

from anomalib_wtflow.diagnosis.certainty import (
    auroc_interval,
    difference_interval,
    false_alarm_band,
    mean_interval,
    placements,
    share_interval,
)


def test_auroc_interval_at_the_ends() -> None:
    """At 1 the lower end solves ``1 - t = z sqrt(V(t))``, with a width; at 0 it is the mirror."""
    low, high = auroc_interval(1.0, 20, 60)
    assert high == 1
    assert 0.9 < low < 1
    z, n = norm.ppf(0.975), 40
    variance = low * (1 - low) * (2 * n - 1 - (3 * n - 3) / ((2 - low) * (1 + low))) / (20 * 60)  # as Newcombe prints V
    assert 1 - low == pytest.approx(z * variance**0.5)
    assert auroc_interval(0.0, 20, 60) == pytest.approx((0, 1 - low))
    assert auroc_interval(1.0, 200, 600)[0] > low


def test_auroc_interval_covers() -> None:
    """Of 1000 tests of 20 good and 60 defective images, about 95 % have the true AUROC in the interval."""
    rng = np.random.default_rng(0)
    for true in (0.75, 0.95):
        shift = norm.ppf(true) * 2**0.5
        measured = [float(placements(rng.normal(size=20), rng.normal(shift, 1, size=60)).mean()) for _ in range(1000)]
        ends = [auroc_interval(value, 20, 60) for value in measured]
        assert np.mean([low <= true <= high for low, high in ends]) == pytest.approx(0.95, abs=0.025)


def test_mean_interval() -> None:
    """Of values with symmetric intervals: the half widths add as squares, and fall with the number."""
    assert mean_interval([0.6, 0.8], [(0.5, 0.7), (0.8, 0.8)]) == pytest.approx((0.65, 0.75))
    assert mean_interval([0.8] * 4, [(0.7, 0.84)] * 4) == pytest.approx((0.75, 0.82))


def test_share_interval() -> None:
    """Wilson's: none of n gives 0 to ``z^2 / (n + z^2)``."""
    z = norm.ppf(0.975)
    assert share_interval(0, 63) == pytest.approx((0, z**2 / (63 + z**2)), abs=1e-9)


def test_difference_interval() -> None:
    """Paired: two scores that go together differ surely by little; equal ones not at all."""
    rng = np.random.default_rng(0)
    good, bad = rng.normal(size=100), rng.normal(1, 1, size=100)
    ours = placements(good, bad)
    assert difference_interval([(ours, ours)]) == (0, 0)
    better = placements(good, bad + 0.3)
    low, high = difference_interval([(better, ours)])
    assert 0 < low < (better - ours).mean() < high
    unpaired = np.diff(auroc_interval(float(ours.mean()), 100, 100)).item()
    assert high - low < unpaired / 3
    # Two products alike: the mean of two draws spreads by sqrt(2) less.
    twice = difference_interval([(better, ours)] * 2)
    assert (high - low) / np.diff(twice).item() == pytest.approx(2**0.5, rel=0.1)


def test_false_alarm_band_is_that_of_ranks() -> None:
    """By brute force: of n + m exchangeable images all orders are alike, and those above the j-th count."""
    n, m, exceed = 4, 3, 1
    counts = np.zeros(m + 1)
    for order in product((0, 1), repeat=n + m):  # 1 for a test image, from the highest score down
        if sum(order) == m:
            above = 0
            for rank, test in enumerate(order):
                if not test and rank - above == exceed - 1:
                    break
                above += test
            counts[above] += 1
    below = np.cumsum(counts / counts.sum())
    expected = (int((below < 0.025).sum()), int((below < 0.975).sum()))
    assert false_alarm_band([(m, exceed / (n + 1), n)]) == expected == (0, 3)


def test_false_alarm_band_of_groups() -> None:
    """By simulation; a group without test images adds nothing."""
    rng = np.random.default_rng(0)
    counts = np.zeros(20000)
    for m, exceed, n in ((20, 2, 41), (30, 1, 19)):
        counts += rng.binomial(m, rng.beta(exceed, n + 1 - exceed, 20000))
    low, high = false_alarm_band([(20, 2 / 42, 41), (30, 1 / 20, 19), (0, 0.05, 99)])
    assert np.mean(counts < low) <= 0.025 < np.mean(counts <= low)
    assert np.mean(counts > high) <= 0.0275
    assert np.mean(counts >= high) > 0.0225
