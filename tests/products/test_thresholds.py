"""A threshold for each product, images that are like none, and exact false-alarm rates."""

from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from scipy.stats import beta, gamma, kstest
from torch import nn

from anomalib_wtflow import WTFlowPostProcessor
from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.products.recognition import Recognition
from anomalib_wtflow.torch_model import Predictions

RATE = 0.1


def calibrated(scores: torch.Tensor, index: torch.Tensor, count: int, **kwargs: Any) -> WTFlowPostProcessor:
    """Thresholds from image scores; the largest pixels are 1 above them."""
    post = WTFlowPostProcessor(RATE, **kwargs)
    post.calibrate(Scores(scores, scores + 1, index), count)
    return post


def three(**kwargs: Any) -> WTFlowPostProcessor:
    """Thresholds of three products whose scores are of different sizes."""
    index = torch.arange(3).repeat(30)
    return calibrated(torch.rand(90) * 10.0**index, index, 3, **kwargs)


def raw(score: torch.Tensor, anomaly_map: torch.Tensor, index: Any, distance: Any) -> Predictions:
    return Predictions(score, anomaly_map, Recognition(torch.as_tensor(index), torch.as_tensor(distance)))


def test_thresholds_by_product() -> None:
    """Each has the rate that its own number of images allows, whatever their order."""
    counts = (4, 19, 99)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    scores = torch.cat([torch.arange(1.0, count + 1) for count in counts])
    order = torch.randperm(len(scores))
    post = calibrated(scores[order], index[order], 3)
    assert post.image_threshold.tolist() == [4, 18, 90]
    assert post.pixel_threshold.tolist() == [5, 19, 91]
    assert post.effective_false_alarm_rate.tolist() == pytest.approx([1 / 5, 2 / 20, 10 / 100])
    assert post.calibration_images.tolist() == list(counts)
    post.calibrate(Scores(torch.arange(9.0), torch.arange(9.0), torch.ones(9, dtype=torch.int64)), 3)
    assert post.image_threshold.tolist() == [4, 8, 90]  # what has no new images keeps its own
    assert post.calibration_images.tolist() == [4, 9, 99]


def test_each_image_is_judged_by_its_products_thresholds() -> None:
    post = three()
    index, times = torch.tensor([0, 1, 2, 2]), torch.tensor([0.5, 2.0, 0.5, 2.0])
    maps = (times * post.pixel_threshold[index])[:, None, None, None].expand(4, 1, 2, 2)
    result = post(raw(times * post.image_threshold[index], maps, index, torch.zeros(4)))
    torch.testing.assert_close(result.pred_score, times / (times + 1))
    torch.testing.assert_close(result.anomaly_map, (times / (times + 1))[:, None, None, None].expand(4, 1, 2, 2))
    assert result.pred_label.tolist() == [False, True, False, True]
    assert result.pred_mask.flatten(1).all(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("sensitivity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalised", [True, False])
def test_an_image_like_no_product_is_anomalous(sensitivity: float, normalised: bool) -> None:
    """Whatever its score and the sensitivity; its normalised score is at least d / (1 + d)."""
    post = three(image_sensitivity=sensitivity, enable_normalization=normalised)
    distance = [1.0, 1.0001, 5.0, 5.0, torch.inf]
    score = torch.tensor([0.0, 0.0, 0.0, 1e6, 0.0])
    result = post(raw(score, torch.zeros(5, 1, 2, 2), [0, 1, 2, 0, 1], distance))
    assert result.pred_label.tolist() == [False, True, True, True, True]
    if normalised:
        least = torch.tensor([0.0, 1.0001 / 2.0001, 5 / 6, 5 / 6, 1.0])
        assert (result.pred_score >= least - 1e-6).all()
        torch.testing.assert_close(result.pred_score[[0, 1, 2]], least[[0, 1, 2]])


def test_a_threshold_of_zero_does_not_hide_it() -> None:
    post = calibrated(torch.zeros(30), torch.zeros(30, dtype=torch.int64), 1)
    result = post(raw(torch.zeros(2), torch.zeros(2, 1, 2, 2), [0, 0], [2.0, 0]))
    assert result.pred_label.tolist() == [True, False]
    assert result.pred_score[0] > 0.5 > result.pred_score[1]


def test_unknown_images_count_as_false_alarms_of_their_product() -> None:
    """20 scores each: floor(0.1 x 21) = 2 of 21 may exceed, so it is the 19th smallest, infinite ones included."""
    index = torch.arange(2).repeat(20)
    scores = torch.stack([torch.randperm(20), 100 + torch.randperm(20)], dim=1).float().flatten()
    assert calibrated(scores, index, 2).image_threshold.tolist() == [18, 118]
    distance = torch.where(scores == 100, 1.1, 0.5)
    held = Scores.of(scores, scores, Recognition(index, distance))
    post = WTFlowPostProcessor(RATE)
    post.calibrate(held, 2)
    assert post.image_threshold.tolist() == [18, 119]
    too_many = Scores.of(scores, scores, Recognition(index, torch.where(scores >= 118, 1.1, 0.5)))
    with pytest.raises(WTFlowError, match=r"^20 scores of normal images, 2 of them NaN or infinite, give no threshold"):
        post.calibrate(too_many, 2)


def test_the_state_brings_the_number_of_products() -> None:
    """More take the place of fewer, and fewer that of more."""
    post, fresh = three(), WTFlowPostProcessor(RATE)
    fresh.load_state_dict(post.state_dict())
    for name in ("image_threshold", "effective_false_alarm_rate", "calibration_images"):
        assert torch.equal(getattr(fresh, name), getattr(post, name))
    fresh.load_state_dict(calibrated(torch.arange(9.0), torch.zeros(9, dtype=torch.int64), 1).state_dict())
    assert fresh.image_threshold.tolist() == [8]


class Graph(nn.Module):
    """The post-processor, with tensors for arguments."""

    def __init__(self, post_processor: WTFlowPostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, score: torch.Tensor, anomaly_map: torch.Tensor, *shown: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.post_processor(Predictions(score, anomaly_map, Recognition(*shown))))


def test_graphs_batches_and_modules_judge_alike() -> None:
    """With good, anomalous, unknown and broken images of three products."""
    post = three(image_sensitivity=0.4, pixel_sensitivity=0.6)
    index = torch.arange(60) % 3
    distance = torch.where(torch.arange(60) % 5 == 0, 3.0, 0.5)
    score = 3 * torch.rand(60) * 10.0**index
    score[7] = distance[7] = torch.nan
    anomaly_map = 2 * torch.rand(60, 1, 6, 5) * 10.0 ** index[:, None, None, None]
    module = post(raw(score, anomaly_map, index, distance))
    given = (score, anomaly_map, index, distance)
    graph = torch.export.export(Graph(post), given).module()(*given)
    batch = ImageBatch(image=torch.rand(60, 3, 6, 5), pred_score=score, anomaly_map=anomaly_map)
    batch.recognition = Recognition(index, distance)
    post.post_process_batch(batch)
    for name, exported in zip(module._fields, graph, strict=True):
        assert torch.equal(exported, getattr(module, name)), name
        assert torch.equal(getattr(batch, name).flatten(), getattr(module, name).flatten()), name
    called = module.pred_label
    assert called[distance > 1].all()
    assert called[7]
    assert module.pred_score[7] == 1
    assert 0.05 < called[distance < 1].float().mean() < 0.95


def test_the_false_alarm_rate_has_the_distribution_that_theory_says() -> None:
    """Of images recognised as each product, over 200 draws: ``Beta(k, n + 1 - k)``, k = 4 of n = 40 may exceed.

    One image in ten is taken for the other product, and one in 200 is like none. Scores are drawn from gamma
    distributions, so the rate beyond a threshold is known exactly. The draws tell this distribution from that of the
    next rank, and from what one threshold for both products gives.
    """
    rng, draws, n, k, mixed, unknown = np.random.default_rng(4), 200, 40, 4, 0.1, 0.005
    shapes, scales = np.array([2.0, 3.0]), np.array([1.0, 3.0])

    def beyond(threshold: float, product: int) -> float:
        tails = gamma(shapes, scale=scales).sf(threshold)
        return unknown + (1 - unknown) * ((1 - mixed) * tails[product] + mixed * tails[1 - product])

    rates: dict[str, list[list[float]]] = {"own": [[], []], "pooled": [[], []]}
    for _ in range(draws):
        seen = np.repeat([0, 1], n)
        true = np.where(rng.random(2 * n) < mixed, 1 - seen, seen)
        scores = rng.gamma(shapes[true], scales[true])
        scores[rng.random(2 * n) < unknown] = np.inf
        shown, index = torch.from_numpy(scores), torch.from_numpy(seen)
        own, pooled = calibrated(shown, index, 2), calibrated(shown, torch.zeros_like(index), 1)
        for product in (0, 1):
            rates["own"][product].append(beyond(float(own.image_threshold[product]), product))
            rates["pooled"][product].append(beyond(float(pooled.image_threshold[0]), product))
    promised = beta(k, n + 1 - k)
    for product in (0, 1):
        found = np.array(rates["own"][product])
        assert kstest(found, promised.cdf).pvalue > 0.001
        for other in (k - 1, k + 1):
            assert kstest(found, beta(other, n + 1 - other).cdf).pvalue < 1e-4
        assert kstest(rates["pooled"][product], promised.cdf).pvalue < 1e-6
    assert np.mean(rates["pooled"][1]) > RATE
