"""Weighted areas under the curve, which give the intervals."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks import cached, contribution


def test_weighted_aurocs_against_sklearn():
    generator = np.random.default_rng(0)
    label = generator.random(30) > 0.5
    pixels = torch.from_numpy(generator.integers(0, 50, size=(30, 4, 4)).astype(float))
    masks = torch.from_numpy((generator.random((30, 4, 4)) > 0.6) & label[:, None, None])
    score = pixels.amax((1, 2)).numpy()
    weight = contribution.draws(label, generator)[[0, 1, 7]]
    assert (weight[:, label].sum(1) == label.sum()).all()
    assert (weight[:, ~label].sum(1) == (~label).sum()).all()
    images = contribution.image_auroc(score, label, weight)
    flat = contribution.pixel_auroc(contribution.histograms(pixels, masks), weight)
    for row, w in enumerate(weight):
        assert images[row] == pytest.approx(roc_auc_score(label, score, sample_weight=w))
        expected = roc_auc_score(masks.flatten(), pixels.flatten(), sample_weight=w.repeat(16))
        assert flat[row] == pytest.approx(expected)


@pytest.mark.parametrize("masks", [True, False])
def test_differences_are_those_of_the_means(masks, monkeypatch):
    labels = torch.arange(20) >= 10
    cache = cached.Cache()
    cache.loaded["d"] = cached.Images({}, {}, labels, labels[:, None, None].expand(20, 4, 4) if masks else None)

    def result(data, point):
        noise = torch.Generator().manual_seed(point["seed"])
        shift = 0.0 if point["start_time"] is None else 3.0
        scores = torch.randn(20, generator=noise) + shift * labels
        return cached.Result(scores, scores[:, None, None].expand(20, 4, 4).clone(), 0, 0.0)

    monkeypatch.setattr(cache, "result", result)
    line = contribution.contribution(cache, "d", cached.start(), [0, 1])
    shown = {(d["of"], d["to"], d["metric"]): d for d in line["differences"]}
    metrics = ["image_AUROC", "pixel_AUROC"] if masks else ["image_AUROC"]
    assert {metric for *_, metric in shown} == set(metrics)
    for metric in metrics:
        ours = np.mean([run[metric] for run in line["metrics"]["worst"]])
        gain = shown["worst", contribution.NO_FLOW, metric]
        assert gain["difference"] == pytest.approx(ours - line["metrics"][contribution.NO_FLOW][0][metric], abs=2e-3)
        assert 0 < gain["low"] < gain["difference"] < gain["high"]
        assert shown["worst", "independent", metric]["difference"] == 0
    text = contribution.render([{**line, "data": "d"}])
    assert ("|  |  |" in text) is not masks
