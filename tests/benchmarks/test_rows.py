"""The models and the data sets of the benchmarks."""

import shutil

import pytest
import torch
from anomalib.data import ImageBatch
from torchmetrics.classification import BinaryAUROC

from anomalib_wtflow import WTFlow
from anomalib_wtflow.features.store import Row
from benchmarks import accuracy, datasets, models


def squashed(scores: torch.Tensor) -> ImageBatch:
    size = len(scores)
    maps = scores[:, None, None].repeat(1, 2, 2)
    batch = ImageBatch(image=torch.zeros(size, 3, 2, 2), pred_score=scores.clone(), anomaly_map=maps)
    models.Squash(enable_normalization=False, enable_thresholding=False).post_process_batch(batch)
    return batch


def test_squash_keeps_ranks_of_large_scores():
    """Which torchmetrics alone does not: scores outside [0, 1] pass a sigmoid, which is 1 in float32 from 17 on."""
    batch = squashed(torch.tensor([-500.0, -1.0, 0.0, 1e-3, 1.0, 40.0, 40.001, 5000.0]))
    assert (batch.pred_score.diff() > 0).all()
    assert batch.pred_score.min() > 0
    assert batch.pred_score.max() < 1
    assert torch.equal(batch.anomaly_map[:, 0, 0], batch.pred_score)
    scores, labels = torch.tensor([20.0, 30.0, 40.0, 50.0]), torch.tensor([0, 0, 1, 1])
    assert BinaryAUROC()(scores, labels) == 0.5
    assert BinaryAUROC()(squashed(scores).pred_score, labels) == 1.0


@pytest.mark.parametrize("row", ["Patchcore", "MHPatchcore", "Padim", "FastFlow"])
def test_peers_run_the_packaged_backbone(row):
    network = models.feature_network(models.build(row, "synthetic"))
    ours = models.packaged_network()
    image = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(network.eval()(image), ours(image), strict=True))
    assert not any(p.requires_grad for p in network.parameters())


def fitted(row: str, features: torch.Tensor) -> WTFlow:
    """A control that is fitted to backbone features."""
    model = models.build(row, "synthetic")
    model.products, model.image_size = ["parts"], (64, 64)
    model._fit_model([Row(0.0, k, f"{k}.png", "parts", each.clone()) for k, each in enumerate(features)])
    return model


def test_no_flow_leaves_features_where_they_are():
    features = torch.randn(4, 176, 4, 4)
    x0, index = torch.randn(2, 176, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(fitted("No flow", features).model.flow(x0, index), x0)
    model = fitted("No flow, position means", features).model
    normalised, _ = model.normalise(features)
    torch.testing.assert_close(model.flow(normalised[:2], index), normalised[:2] - normalised.mean(0))


def test_nearest_neighbour_against_brute_force():
    model = fitted("Nearest neighbour", torch.randn(3, 176, 4, 4)).model
    bank = model.normalise(torch.randn(3, 176, 4, 4))[0]
    model.log_density.__self__.learn(list(bank), torch.zeros(3, dtype=torch.int64))
    features = torch.randn(2, 176, 16, 16)
    x0, recognition = model.normalise(features)
    points, rows = (x.movedim(1, -1).flatten(0, -2) for x in (x0, bank))
    distance = torch.cdist(points, rows).amin(1).view(2, 1, 16, 16)
    expected = torch.log1p(2 * distance.square() / 176)
    result = model.predict(features, (64, 64))
    window = torch.nn.functional.avg_pool2d(expected, 3, 1, 1, count_include_pad=False)
    generator = model.anomaly_map_generator
    torch.testing.assert_close(result.pred_score, generator.score(window, recognition.index), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.anomaly_map, generator.map(-expected, (64, 64)), rtol=1e-4, atol=1e-4)


def test_a_model_with_statistics_and_thresholds_of_noise_judges_each_product():
    features = torch.randn(4, 176, 4, 4) + 10 * torch.eye(4, 176)[:, :, None, None]
    model = models.with_statistics(WTFlow(pre_trained=False), features.repeat(2, 1, 1, 1), torch.arange(4).repeat(2))
    result = model.model.predict(features, (64, 64))
    assert result.recognition.names(model.products) == ["product 00", "product 01", "product 02", "product 03"]
    assert torch.equal(model.post_processor.image_threshold, torch.ones(4))
    assert model.post_processor(result).pred_score.isfinite().all()


@pytest.mark.skipif(not datasets.SHARED.is_dir(), reason="no shared data")
def test_ball_screws_are_there_when_asked_for():
    module = datasets.data_module("ball_screw")
    assert (len(module.train_data), len(module.test_data)) == (300, 537)
    assert not datasets.has_masks(module)
    assert "ball_screw" not in datasets.DATA
    with pytest.raises(FileNotFoundError, match="no data set 'bottles'"):
        datasets.data_module("bottles")


@pytest.fixture
def unmarked(parts, tmp_path):
    """The small drawn data set in MVTec's layout, without its masks."""
    parts.prepare_data()
    shutil.copytree(parts.root, tmp_path / "parts", ignore=shutil.ignore_patterns("ground_truth"))
    return tmp_path / "parts"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:false_alarm_rate=")  # so few images
@pytest.mark.parametrize("row", ["No flow, position means", "Nearest neighbour", "Padim"])
def test_a_data_set_without_masks_is_tested_on_images(row, unmarked):
    assert not datasets.has_masks(datasets.data_module(str(unmarked)))
    line = accuracy.run(row, str(unmarked))
    assert {"image_AUROC", "image_AUPR", "image_F1Max"} <= set(line["metrics"])
    assert ("false_alarms" in line["metrics"]) is (row != "Padim")
    assert (line["train_images"], line["test_images"]) == (16, 32)
    assert "|  |  |  |" in accuracy.render([{**line, "model": row, "data": "parts", "seed": 0}])
