"""The experiments on cached features: their metrics, and the rule that chose the defaults."""

import numpy as np
import pytest
import torch

from anomalib_wtflow.settings import get_settings
from benchmarks import ablation, cached
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
    trainings, train = [], cached.train
    monkeypatch.setattr(cached, "train", lambda *arguments: trainings.append(arguments) or train(*arguments))
    cache = cached.Cache()
    cache.loaded["d"] = images(masks)
    point = cached.start(max_epochs=1, width=8)
    results = [cache.result("d", {**point, **change}) for change in ({}, {"contrast": 0.0}, {"start_time": 0.2})]
    assert len(trainings) == 1
    assert results[0].parameters > 0
    assert not torch.equal(results[0].scores, results[2].scores)
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
            point = cached.start(**change)
            assert get_settings(**{name: value for name, value in point.items() if name not in cached.EXTRAS})
    with pytest.raises(ValueError, match="no setting 'thinning'"):
        cached.start(thinning=4)


def test_mean_ranks():
    results = [
        {"label": label, "data": data, "metrics": dict.fromkeys(METRICS, value)}
        for data in ablation.REAL
        for label, value in (("a", 0.9), ("b", 0.8), ("c", 0.9))
    ]
    assert ablation.mean_ranks(results) == {"a": 1.5, "b": 3.0, "c": 1.5}


def measured(setting, rank, parameters=1000, seconds=10.0):
    return [
        {
            "label": str(setting), "data": data, "setting": setting, "parameters": parameters,
            "metrics": dict.fromkeys(METRICS, 1 - 0.1 * rank), "seconds": seconds,
        }
        for data in ablation.REAL
    ]  # fmt: skip


def test_the_rule_takes_the_best_rank_within_the_bounds():
    wide, slow, unet = cached.start(width=512), cached.start(max_epochs=500), cached.start(network="unet")
    results = (
        measured(BASE, 3) + measured(wide, 2, 2000) + measured(slow, 1, seconds=301) + measured(unet, 0, 6_000_000)
    )
    assert ablation.winner(results, BASE) == wide


def test_the_rule_breaks_ties_by_parameters_then_computation_then_the_base():
    small, long, fine = cached.start(width=128), cached.start(max_epochs=160), cached.start(steps=2)
    assert ablation.winner(measured(BASE, 1, 2000) + measured(small, 1, 1000), BASE) == small
    assert ablation.winner(measured(long, 1) + measured(fine, 1) + measured(BASE, 1), BASE) == BASE
    other = cached.start(coupling="optimal")
    assert ablation.winner(measured(other, 1) + measured(BASE, 1), BASE) == BASE


def test_a_factor_is_ranked_at_its_own_start_time():
    base = cached.start(start_time=0.3)
    lines = [
        {**line, "factor": "importance", "base": base}
        for importance in (1.0, 2.0)
        for start_time in (None, 0.3, 0.4)
        for line in measured({**base, "importance": importance, "start_time": start_time}, importance)
    ]
    ranked = ablation.of_factor(lines, "importance", base)
    assert {line["label"] for line in ranked} == {"importance=1.0", "importance=2.0"}
    assert {line["setting"]["start_time"] for line in ranked} == {base["start_time"]}
    assert ablation.start_times("importance", base) == [0.3]
    assert ablation.start_times("pool", base) == [None, 0.3]
    assert ablation.start_times("start", {**base, "start_time": 0.7}) == [0.7]


def test_what_is_not_measured_on_all_sets_is_not_ranked():
    wide = cached.start(width=512)
    lines = [{**line, "factor": "network", "base": BASE} for line in measured(BASE, 2) + measured(wide, 1)[:1]]
    assert {line["setting"]["width"] for line in ablation.of_factor(lines, "network")} == {None}
    assert "512" not in ablation.render(lines)


def test_another_factors_measurement_is_taken_over():
    gives = {"factor": "new", "data": "d", "setting": BASE, "base": BASE}
    line = {**gives, "factor": "old", "metrics": {"image_AUROC": 0.5}}
    assert ablation.measure_one(cached.Cache(), [line], gives) == {**line, "factor": "new"}
