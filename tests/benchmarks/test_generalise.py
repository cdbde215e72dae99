"""Pseudo-anomalies, and who chooses what from the criteria."""

import numpy as np
import pytest
import torch

from anomalib_wtflow.settings import get_settings
from benchmarks import cached, generalise
from benchmarks.pseudo import KINDS, blob, drift

SHAPE = (3, 64, 64)


def parts(seed=0):
    draw = np.random.default_rng(seed)
    return draw.uniform(0.2, 0.8, SHAPE), draw.uniform(0.2, 0.8, SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_altered_copies(kind):
    """In range, from the seed alone, and another image than before; only a line may be thin."""
    image, other = parts()
    one, again, two = (KINDS[kind](image, other, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == SHAPE
    assert 0 <= one.min() <= one.max() <= 1
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 0.05
    changed = np.abs(one - image).max(0) > 0.02
    assert 0.0005 < changed.mean() < 0.3


def test_drift_changes_all_of_an_image():
    image, _ = parts()
    changed = np.abs(drift(image, np.random.default_rng(0)) - image).max(0) > 1e-3
    assert changed.mean() > 0.95


def test_blobs_cover_their_share():
    shares = [blob(np.random.default_rng(seed), (128, 128), 0.03).mean() for seed in range(20)]
    assert np.mean(shares) == pytest.approx(0.03, rel=0.05)


def line(data, setting, auroc, still, drifted):
    return {
        "factor": "contrast",
        "data": data,
        "setting": {"contrast": setting},
        "criteria": {"still": still, "drifted": drifted},
        "metrics": {"image_AUROC": auroc},
        "foreign": 1.0,
    }


def test_agreement_is_spearmans():
    lines = [line("a", s, auroc, still, 0.5) for s, auroc, still in ((0, 0.7, 0.6), (1, 0.8, 0.9), (2, 0.9, 0.8))]
    assert generalise.agreement(lines, "still") == pytest.approx(0.5)  # 1 - 6 (0 + 1 + 1) / (3 (9 - 1))
    assert np.isnan(generalise.agreement(lines, "drifted"))
    assert np.isnan(generalise.agreement(lines[:1], "still"))


def test_leaving_one_set_out():
    values = {"x": {"a": 1.0, "b": 0.5, "c": 0.5}, "y": {"a": 0.0, "b": 0.6, "c": 0.6}}
    assert generalise.left_out(values) == {"a": "y", "b": "x", "c": "x"}


def test_render_says_who_chooses_what():
    lines = [
        line(data, setting, auroc, still, drifted)
        for data in ("mvtec_bottle", "screw")
        for setting, auroc, still, drifted in ((0.0, 0.7, 0.9, 0.6), (1.0, 0.8, 0.8, 0.7))
    ]
    text = generalise.render(lines)
    assert "| contrast=1.0 | 0.8000 (0.800, 0.700) | 0.8000 (0.800, 0.700) | 0.8000 | 100% |" in text
    assert "| still | contrast=0.0 (rho -1.00) | contrast=0.0 (rho -1.00) |" in text
    assert "| drifted | contrast=1.0 (rho +1.00) | contrast=1.0 (rho +1.00) |" in text
    assert "| left out | contrast=1.0 | contrast=1.0 |" in text


def test_factors_are_settings_that_there_are():
    """Each varies the setting that it is named after, and the base is one of a factor's settings or of its own."""
    base = generalise.OPTIONS["base"]
    for factor, changes in generalise.FACTORS.items():
        points = [cached.start(**{**base, **change}) for change in changes]
        assert len({str(point[factor]) for point in points}) == len(changes)
        assert all(get_settings(**{k: v for k, v in point.items() if k not in cached.EXTRAS}) for point in points)


def test_auroc_counts_ties_half():
    assert generalise.auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.875
