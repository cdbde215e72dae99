"""The two ways of calibrating, on features that are drawn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from benchmarks import cached, threshold


def test_best_f1_at_a_rate_against_all_thresholds():
    generator = np.random.default_rng(0)
    label, score = generator.random(60) > 0.5, generator.random(60).round(1)
    for rate in (0.0, 0.1, 0.5):
        alarms = [score >= t for t in [*np.unique(score), 2.0]]
        brute = max(f1_score(label, alarm) for alarm in alarms if alarm[~label].mean() <= rate)
        assert threshold.best_at_rate(label, score, rate) == pytest.approx(brute)


def test_both_ways(monkeypatch):
    """Each image is scored by a field that was trained without it, once; all train the field of ``cross``."""
    trained, train = [], cached.train
    monkeypatch.setattr(threshold, "train", lambda model, x0, point: trained.append(len(x0)) or train(model, x0, point))
    generator = torch.Generator().manual_seed(0)

    def maps(count, scale=1.0):
        sides = zip(cached.LAYERS, ((24, 64), (40, 32), (112, 16), (320, 8)), strict=True)
        return {name: scale * torch.randn(count, c, s, s, generator=generator) for name, (c, s) in sides}

    test = {
        name: torch.cat([good, bad]) for (name, good), bad in zip(maps(3).items(), maps(3, 3.0).values(), strict=True)
    }
    images = cached.Images(maps(16), test, torch.tensor([False] * 3 + [True] * 3), None, maps(4))
    split, cross = threshold.measure_ways(images, cached.start(max_epochs=1, width=8))
    assert trained == [16, 20, 15, 15, 15, 15]
    assert (split["images"], cross["images"]) == (16, 20)
    assert split["auroc"] == cross["auroc"] == split["best"] == cross["best_at_rate"] == 1.0
