"""The experiments on cached features: their metrics and tables."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from anomalib_wtflow.settings import get_settings
from benchmarks import ablation, cached, contribution
from benchmarks.common import METRICS

BASE = cached.start()


def test_best_f1_against_all_thresholds():
    generator = np.random.default_rng(0)
    label, score = generator.random(50) > 0.6, generator.random(50).round(1)
    brute = max(2 * (label & (score >= t)).sum() / ((score >= t).sum() + label.sum()) for t in np.unique(score))
    assert cached.best_f1(label, score) == pytest.approx(brute)


def images(masks=True):
    """Maps of 8 training and 6 test images, of which the last 3 are strange all over."""
    sides = dict(zip(cached.LAYERS, ((24, 64), (40, 32), (112, 16), (320, 8)), strict=True))
    train, test = ({name: torch.randn(n, c, s, s).half() for name, (c, s) in sides.items()} for n in (8, 6))
    for maps in test.values():
        maps[3:] *= 3
    labels = torch.tensor([False] * 3 + [True] * 3)
    marks = torch.zeros(6, 64, 64, dtype=torch.bool)
    marks[3:, 8:40, 8:40] = True
    return cached.Images(train, test, labels, marks if masks else None)


@pytest.mark.parametrize("masks", [True, False])
def test_an_experiment_trains_once_for_all_its_scores(masks, monkeypatch):
    trainings, fit = [], cached.fit_model
    monkeypatch.setattr(cached, "fit_model", lambda *arguments: trainings.append(arguments) or fit(*arguments))
    cache = cached.Cache()
    cache.loaded["d"] = images(masks)
    point = cached.start(max_epochs=1, width=8)
    results = [
        cache.result("d", {**point, **change}) for change in ({}, {"background_slope": 0.0}, {"start_time": 0.2}, {})
    ]
    assert len(trainings) == 1
    assert results[0].parameters > 0
    assert not torch.equal(results[0].scores, results[2].scores)
    assert torch.equal(results[0].scores, results[3].scores)
    control = cache.result("d", {**point, "start_time": None})
    assert (len(trainings), control.parameters, control.seconds) == (1, 0, 0.0)
    metrics = cached.measure(control, cache.images("d"))
    assert list(metrics) == list(METRICS)[: 6 if masks else 3]
    assert metrics["image_AUROC"] == 1.0
    cache.result("d", {**point, "importance": 0.0})
    assert len(trainings) == 2


def test_a_factor_varies_what_there_is():
    for changes in ablation.FACTORS.values():
        for change in changes:
            assert get_settings(**cached.start(**change))
    with pytest.raises(ValueError, match="no setting 'thinning'"):
        cached.start(thinning=4)


def measured(setting, value, sets=ablation.REAL):
    return [
        {"factor": "f", "base": BASE, "data": data, "setting": setting, "metrics": dict.fromkeys(METRICS, value)}
        for data in sets
    ]


def test_settings_are_ranked_at_the_base_s_start_time():
    """Ties share a rank; seeds are averaged; the control, and what is not there for all sets, is left out."""
    settings = {width: cached.start(width=width) for width in (64, 128, 256, 512)}
    lines = measured(settings[64], 0.9) + measured(settings[128], 0.8) + measured({**settings[256], "seed": 1}, 0.8)
    lines += measured(settings[256], 1.0) + measured(settings[512], 1.0, ablation.REAL[:1])
    lines += measured(cached.start(width=64, start_time=None), 1.0) + measured(cached.start(start_time=0.9), 1.0)
    rows = ablation.of_factor(lines, "f")
    assert ablation.mean_ranks(rows) == {"width=64": 1.5, "width=256": 1.5, "width=128": 3.0}
    assert "| width=128 | 3.00 | 0.8000 | 0.8000 |" in ablation.render(lines)
    assert ablation.start_times("importance", BASE) == [BASE["start_time"]]
    assert ablation.start_times("pool", BASE) == [None, BASE["start_time"]]


def test_weighted_auroc_against_sklearn():
    generator = np.random.default_rng(0)
    label, score = generator.random(30) > 0.5, generator.integers(0, 10, 30).astype(float)
    weight = contribution.draws(label, generator)[[0, 1, 7]]
    assert (weight[:, label].sum(1) == label.sum()).all()
    assert (weight[:, ~label].sum(1) == (~label).sum()).all()
    for value, w in zip(contribution.image_auroc(score, label, weight), weight, strict=True):
        assert value == pytest.approx(roc_auc_score(label, score, sample_weight=w))


def test_differences_are_those_of_the_means(monkeypatch):
    labels = torch.arange(20) >= 10
    cache = cached.Cache()
    cache.loaded["d"] = cached.Images({}, {}, labels, None)

    def result(data, point):
        noise = torch.Generator().manual_seed(point["seed"])
        shift = 0.0 if point["start_time"] is None else 3.0
        scores = torch.randn(20, generator=noise) + shift * labels
        return cached.Result(scores, scores[:, None, None], 0, 0.0)

    monkeypatch.setattr(cache, "result", result)
    line = contribution.contribution(cache, "d", BASE, [0, 1])
    shown = {(d["of"], d["to"]): d for d in line["differences"]}
    worst = np.mean([run["image_AUROC"] for run in line["metrics"]["worst"]])
    gain = shown["worst", contribution.NO_FLOW]
    control = line["metrics"][contribution.NO_FLOW][0]["image_AUROC"]
    assert gain["difference"] == pytest.approx(worst - control, abs=2e-3)
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    assert shown["worst", "independent"]["difference"] == 0
    assert f"| worst less {contribution.NO_FLOW} | +" in contribution.render([{**line, "data": "d"}])
