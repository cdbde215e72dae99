"""The models and the data sets of the benchmarks, and their metrics."""

import shutil

import pytest
import torch
from anomalib.data import ImageBatch
from torch import nn
from torchmetrics.classification import BinaryAUROC

from anomalib_wtflow.features.backbone import FeatureExtractor
from anomalib_wtflow.features.cache import FeatureBatch
from benchmarks import accuracy, datasets, models


class Doubling(nn.Module):
    """A frozen network that counts the images that pass it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.seen = 0

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen += len(images)
        return [self.weight * images, images.mean(1, keepdim=True)]


def test_memo_runs_each_image_once_and_returns_the_same():
    network, memo = Doubling(), models.Memo()
    images = torch.randn(5, 3, 4, 4)
    expected = network(images)
    network.seen = 0
    memo.wrap(network)
    for order in ([0, 1, 2], [4, 2, 3, 0], [1, 1]):
        for out, whole in zip(network(images[order]), expected, strict=True):
            assert torch.equal(out, whole[order])
    assert network.seen == 5


def test_memo_beyond_its_limit_runs_the_network():
    network = Doubling()
    models.Memo(0).wrap(network)
    network(torch.ones(1, 3, 4, 4))
    network(torch.ones(1, 3, 4, 4))
    assert network.seen == 2


def test_memo_does_not_mix_networks():
    first, second, memo = Doubling(), Doubling(), models.Memo()
    second.weight.fill_(3.0)
    memo.wrap(first)
    memo.wrap(second)
    image = torch.ones(1, 3, 4, 4)
    assert first(image)[0].unique() == 2
    assert second(image)[0].unique() == 3


def test_memo_tells_the_layers_of_one_backbone_apart():
    memo, image = models.Memo(), torch.randn(1, 3, 64, 64)
    for layers in (["blocks.2", "blocks.4"], ["blocks.4"]):
        network = FeatureExtractor(layers=layers).network
        expected = network(image)
        memo.wrap(network)
        assert len(network(image)) == len(layers)
        assert torch.equal(network(image)[-1], expected[-1])


def squashed(scores: torch.Tensor) -> ImageBatch:
    size = len(scores)
    maps = scores[:, None, None].repeat(1, 2, 2)
    batch = ImageBatch(image=torch.zeros(size, 3, 2, 2), pred_score=scores.clone(), anomaly_map=maps)
    models.Squash(enable_normalization=False, enable_thresholding=False).post_process_batch(batch)
    return batch


def test_squash_keeps_ranks_of_large_scores():
    batch = squashed(torch.tensor([-500.0, -1.0, 0.0, 1e-3, 1.0, 40.0, 40.001, 5000.0]))
    assert (batch.pred_score.diff() > 0).all()
    assert batch.pred_score.min() > 0
    assert batch.pred_score.max() < 1
    assert torch.equal(batch.anomaly_map[:, 0, 0], batch.pred_score)


def test_raw_scores_tie_in_torchmetrics_and_squashed_ones_do_not():
    """Why no normalisation is not enough: scores outside [0, 1] pass a sigmoid, which is 1 in float32 from 17 on."""
    scores, labels = torch.tensor([20.0, 30.0, 40.0, 50.0]), torch.tensor([0, 0, 1, 1])
    assert BinaryAUROC()(scores, labels) == 0.5
    assert BinaryAUROC()(squashed(scores).pred_score, labels) == 1.0
    assert torch.sigmoid(torch.tensor(17.0)) == 1


def test_no_row_peeks_or_shares_a_name():
    assert set(accuracy.QUICK["models"]) <= set(models.ROWS)
    assert (accuracy.QUICK["data"], accuracy.QUICK["seeds"]) == (["mvtec_bottle"], [0])
    for row in ("No flow", "WTFlow", "Nearest neighbour"):
        model = models.build(row, "synthetic")
        names = model.model.feature_extractor.network.feature_info.module_name()
        assert names == ["blocks.1", "blocks.2", "blocks.4"]
    assert models.LAYERS == ("blocks.2", "blocks.4")


def test_the_authors_recipe_is_cheaper_but_theirs():
    settings = models.build("WTFlow, authors' recipe", "synthetic").settings
    assert (settings.network, settings.width, settings.start_time, settings.sigma) == ("unet", 48, 0.0, 0.0)
    assert (settings.backbone, settings.image_size) == ("tf_efficientnet_lite0", 256)


@pytest.mark.parametrize("row", ["Patchcore", "MHPatchcore", "Padim", "FastFlow"])
def test_peers_run_the_packaged_backbone(row):
    network = models.feature_network(models.build(row, "synthetic"))
    ours = models.packaged_network()
    image = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(network.eval()(image), ours(image), strict=True))
    assert not any(p.requires_grad for p in network.parameters())


def test_no_flow_is_the_identity():
    model = models.build("No flow", "synthetic")
    x0 = torch.randn(1, model.model.feature_extractor.out_channels, 4, 4)
    assert torch.equal(model.model.flow(x0), x0)
    assert not any(p.requires_grad for p in model.parameters())


def test_nearest_neighbour_against_brute_force():
    model = models.build("Nearest neighbour", "synthetic")
    channels = model.model.feature_extractor.out_channels
    model.model.normalization._fitted.fill_(True)  # with mean 0 and deviation 1
    bank, features = torch.randn(40, channels), torch.randn(2, channels, 16, 16)
    model.bank = [bank[:10], bank[10:]]
    distance = torch.cdist(features.movedim(1, -1).flatten(0, -2), bank).amin(1).view(2, 1, 16, 16)
    expected = torch.log1p(2 * distance.square() / channels)
    result = model.model.predict(features, (32, 32))
    generator = model.model.anomaly_map_generator
    window = torch.nn.functional.avg_pool2d(expected, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(result.pred_score, generator.score(window), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.anomaly_map, generator(-expected, (32, 32))[0], rtol=1e-4, atol=1e-4)


def test_position_means_come_off():
    """The mean of three training images at each position, whatever the batches."""
    model = models.build("No flow, position means", "synthetic")
    x0 = torch.randn(3, model.model.feature_extractor.out_channels, 4, 4)
    for part in (x0[:2], x0[2:]):
        model.training_step(FeatureBatch(image=None, features=part))
    torch.testing.assert_close(model.model.flow(x0), x0 - x0.mean(0))


def test_unknown_data_set():
    with pytest.raises(FileNotFoundError, match="no data set 'bottles'"):
        datasets.data_module("bottles")


@pytest.fixture
def unmarked(parts, tmp_path):
    """The small drawn data set in MVTec's layout, without its masks."""
    parts.prepare_data()
    shutil.copytree(parts.root, tmp_path / "parts", ignore=shutil.ignore_patterns("ground_truth"))
    return tmp_path / "parts"


def test_masks_are_known_before_a_test(parts, unmarked):
    assert datasets.has_masks(datasets.data_module(str(parts.root)))
    module = datasets.data_module(str(unmarked))
    assert not datasets.has_masks(module)
    assert not datasets.every_fourth_pixel(module.test_data[0], (256, 256)).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:false_alarm_rate=")  # so few images
@pytest.mark.parametrize("row", ["WTFlow", "Nearest neighbour", "Padim"])
def test_a_data_set_without_masks_is_tested_on_images(row, unmarked):
    line = accuracy.run(row, str(unmarked), **({"max_epochs": 2} if row == "WTFlow" else {}))
    assert set(line["metrics"]) - {"image_F1Score"} == {"image_AUROC", "image_AUPR", "image_F1Max"}
    assert (line["train_images"], line["test_images"]) == (16, 32)
    assert "|  |  |  |" in accuracy.render([{**line, "model": row, "data": "parts", "seed": 0}])
