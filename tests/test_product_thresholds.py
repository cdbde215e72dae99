"""A threshold for each product, and images that are like none."""

from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from scipy.stats import beta

from anomalib_wtflow import WTFlowPostProcessor
from anomalib_wtflow.post_processor import Scored, conformal_threshold
from anomalib_wtflow.products import Recognition

RATE = 0.1


def calibrated(rate: float = RATE, **kwargs: Any) -> tuple[WTFlowPostProcessor, torch.Tensor, torch.Tensor]:
    """Thresholds of three products whose scores are of different sizes."""
    post = WTFlowPostProcessor(rate, **kwargs)
    product = torch.arange(3).repeat(30)
    scores = torch.rand(90) * 10.0**product
    post.calibrate(scores, scores + 1, product, 3)
    return post, scores, product


def test_thresholds_by_product() -> None:
    """The third largest of 30 scores each: floor(0.1 x 31) exceed."""
    post, scores, product = calibrated()
    for place in range(3):
        own = scores[product == place].sort().values
        assert post.image_threshold[place] == own[-3]
        assert post.pixel_threshold[place] == own[-3] + 1
        assert post.effective_false_alarm_rate[place].item() == pytest.approx(3 / 31)


def test_each_image_is_judged_by_its_products_thresholds() -> None:
    post, _, _ = calibrated()
    product, times = torch.tensor([0, 1, 2, 2]), torch.tensor([0.5, 2.0, 0.5, 2.0])
    score = times * post.image_threshold[product]
    anomaly_map = times[:, None, None, None] * post.pixel_threshold[product][:, None, None, None].expand(4, 1, 2, 2)
    result = post(Scored(score, anomaly_map, product, torch.zeros(4)))
    torch.testing.assert_close(result.pred_score, times / (times + 1))
    torch.testing.assert_close(result.anomaly_map, (times / (times + 1))[:, None, None, None].expand(4, 1, 2, 2))
    assert result.pred_label.tolist() == [False, True, False, True]
    assert result.pred_mask.flatten(1).all(1).tolist() == [False, True, False, True]


def test_without_products_several_thresholds_are_an_error() -> None:
    post, _, _ = calibrated()
    with pytest.raises(ValueError, match="The model has 3 products: say which each image shows"):
        post(InferenceBatch(pred_score=torch.ones(2), anomaly_map=torch.ones(2, 1, 4, 4)))


@pytest.mark.parametrize("sensitivity", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("normalised", [True, False])
def test_an_image_like_no_product_is_anomalous(sensitivity: float, normalised: bool) -> None:
    """Whatever its score and the sensitivity; its normalised score is at least u / (1 + u)."""
    post, _, _ = calibrated(image_sensitivity=sensitivity, enable_normalization=normalised)
    u = torch.tensor([1.0, 1.0001, 5.0, 5.0, torch.inf])
    score = torch.tensor([0.0, 0.0, 0.0, 1e6, 0.0])
    result = post(Scored(score, torch.zeros(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]), u))
    assert result.pred_label.tolist() == [False, True, True, True, True]
    if normalised:
        least = torch.tensor([0.0, 1.0001 / 2.0001, 5 / 6, 5 / 6, 1.0])
        assert (result.pred_score >= least - 1e-6).all()
        torch.testing.assert_close(result.pred_score[[0, 1, 2]], least[[0, 1, 2]])
        assert result.pred_score[3] > 0.99999


def test_a_threshold_of_zero_does_not_hide_it() -> None:
    post = WTFlowPostProcessor(RATE)
    post.calibrate(torch.zeros(30), torch.zeros(30))
    result = post(
        Scored(torch.zeros(2), torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), torch.tensor([2.0, 0]))
    )
    assert result.pred_label.tolist() == [True, False]
    assert result.pred_score[0] > 0.5 > result.pred_score[1]


def test_a_broken_recognition_is_not_normal() -> None:
    """A NaN feature makes score and distance NaN."""
    post, _, _ = calibrated()
    nan = torch.tensor([torch.nan])
    result = post(Scored(nan, torch.zeros(1, 1, 2, 2), torch.tensor([1]), nan))
    assert result.pred_label.tolist() == [True]
    assert result.pred_score.tolist() == [1]


def test_images_like_no_product_count_as_false_alarms() -> None:
    """Infinite scores are above any threshold; the others make room for them, and too many are an error."""
    scores = torch.arange(30.0)
    for unknown in (0, 1, 2):
        shown = scores.clone()
        shown[30 - unknown :] = torch.inf
        assert conformal_threshold(shown, RATE).threshold == 27
    shown[-3:] = torch.inf
    with pytest.raises(ValueError, match=r"^30 scores of normal images, 3 of them NaN or infinite, give no threshold"):
        conformal_threshold(shown, RATE)


def test_batches_are_judged_as_exports_judge() -> None:
    post, _, _ = calibrated()
    product, u = torch.tensor([2, 0, 1]), torch.tensor([0.2, 3.0, 0.9])
    score, anomaly_map = torch.rand(3) * 50, torch.rand(3, 1, 8, 8) * 50
    batch = ImageBatch(image=torch.rand(3, 3, 8, 8), pred_score=score, anomaly_map=anomaly_map)
    batch.recognition = Recognition(product, u)
    post.post_process_batch(batch)
    expected = post(Scored(score, anomaly_map, product, u))
    for name in ("pred_score", "pred_label"):
        assert torch.equal(getattr(batch, name), getattr(expected, name))
    for name in ("anomaly_map", "pred_mask"):
        assert torch.equal(getattr(batch, name).flatten(), getattr(expected, name).flatten())


def test_the_state_brings_the_number_of_products() -> None:
    post, _, _ = calibrated()
    fresh = WTFlowPostProcessor(RATE)
    fresh.load_state_dict(post.state_dict())
    assert torch.equal(fresh.image_threshold, post.image_threshold)
    assert torch.equal(fresh.effective_false_alarm_rate, post.effective_false_alarm_rate)


def test_the_rate_holds_for_each_recognised_product() -> None:
    """Over 200 draws of calibration and next images; some of them are like no product, and products get mixed up.

    The share of next images that exceed the threshold, given the calibration images, is at most Beta(k, n + 1 - k),
    k being how many may exceed; the mean over the draws lies in the 95 % band of the mean of as many of it.
    """
    rng, draws, n, later = np.random.default_rng(0), 200, 40, 400
    shares: list[list[float]] = [[], []]
    for _ in range(draws):
        post = WTFlowPostProcessor(RATE)
        # The product that is recognised depends on the image: one in ten is taken for the other.
        count = 3 * n + 3 * later
        true = rng.integers(2, size=count)
        seen = torch.from_numpy(np.where(rng.random(count) < 0.1, 1 - true, true))
        score = torch.from_numpy(rng.gamma(2 + true, 1.0 + 2 * true))
        strange = torch.from_numpy(rng.random(count) < 0.005)
        chosen = torch.cat([(seen == place).nonzero().flatten()[:n] for place in (0, 1)])
        known = score.masked_fill(strange, torch.inf)[chosen]
        post.calibrate(known, known.clamp(max=1e3), seen[chosen], 2)
        for place in (0, 1):
            next_ = (seen == place).nonzero().flatten()[n : n + later]
            u = torch.where(strange[next_], 2.0, 0.0)
            result = post(Scored(score[next_].float(), torch.zeros(len(next_), 1, 1, 1), seen[next_], u))
            shares[place].append(result.pred_label.float().mean().item())
    k = int(RATE * (n + 1))
    promised = beta(k, n + 1 - k)
    margin = 1.96 * np.sqrt((promised.var() + RATE * (1 - RATE) / later) / draws)
    for place in (0, 1):
        assert abs(np.mean(shares[place]) - promised.mean()) < margin
        assert np.mean(shares[place]) < RATE + margin
