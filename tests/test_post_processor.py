"""The conformal threshold against its guarantee, and the post-processor against anomalib's."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given
from hypothesis import strategies as st

from anomalib_wtflow import WTFlowPostProcessor
from anomalib_wtflow.conformal import Scores, conformal_threshold
from anomalib_wtflow.products.recognition import Recognition
from anomalib_wtflow.settings import get_settings
from anomalib_wtflow.torch_model import Predictions


@given(n=st.integers(1, 60), rate=st.floats(0.001, 0.999))
def test_the_guarantee_is_exact(n: int, rate: float) -> None:
    """Of n + 1 exchangeable scores each is equally likely the new one: count how many exceed the others' threshold."""
    scores = torch.randperm(n + 1).double()
    alarms = [bool(s > conformal_threshold(scores[scores != s], rate).threshold) for s in scores]
    effective = conformal_threshold(scores[1:], rate).false_alarm_rate
    assert sum(alarms) / (n + 1) == pytest.approx(effective)
    assert effective <= rate + 1e-9 or effective == 1 / (n + 1)
    assert effective > rate - 1 / (n + 1) - 1e-9  # no larger threshold than needed


@pytest.mark.parametrize(("n", "rate", "rank"), [(99, 0.01, 99), (19, 0.05, 19), (39, 0.05, 38), (99, 0.29, 71)])
def test_ranks(n: int, rate: float, rank: int) -> None:
    """k = n + 1 - floor(rate (n + 1)) in exact arithmetic: 0.29 * 100 is 29, not 28.999."""
    assert conformal_threshold(torch.arange(1.0, n + 1), rate) == (rank, pytest.approx((n + 1 - rank) / (n + 1)))


def test_too_few_images() -> None:
    result = conformal_threshold(torch.tensor([3.0, 1, 2]), 0.01)
    assert result == (3.0, 0.25)


def test_no_scores() -> None:
    with pytest.raises(ValueError, match="0 scores of normal images"):
        conformal_threshold(torch.tensor([]), 0.1)
    with pytest.raises(ValueError, match="1 of them NaN or infinite"):
        conformal_threshold(torch.tensor([1.0, float("nan")]), 0.1)


def processor(threshold: float = 2.0, **kwargs: object) -> WTFlowPostProcessor:
    result = WTFlowPostProcessor(**kwargs)
    result._image_threshold.fill_(threshold)
    result._pixel_threshold.fill_(threshold)
    return result


def known(count: int) -> Recognition:
    """Images of the only product."""
    return Recognition(torch.zeros(count, dtype=torch.int64), torch.zeros(count))


def predictions(scores: list[float]) -> Predictions:
    score = torch.tensor(scores)
    return Predictions(score, score[:, None, None, None].expand(-1, 1, 2, 3).clone(), known(len(score)))


def test_normalised_scores() -> None:
    result = processor()(predictions([0.0, 1.0, 2.0, 6.0, 1e6]))
    torch.testing.assert_close(result.pred_score, torch.tensor([0.0, 1 / 3, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(result.anomaly_map[:, 0, 0, 0], result.pred_score)
    assert result.pred_label.tolist() == [False, False, False, True, True]
    assert result.pred_mask[:, 0, 0, 0].tolist() == result.pred_label.tolist()


def test_order_is_kept() -> None:
    scores = torch.logspace(-3, 3, 500)
    result = processor()(Predictions(scores, torch.ones(500, 1, 1, 1), known(500)))
    assert (result.pred_score.diff() > 0).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_sensitivity(normalised: bool) -> None:
    """A higher sensitivity lowers the limit, to s / (s + T) = 1 - sensitivity; it does not depend on normalisation."""
    post = processor(image_sensitivity=0.6, pixel_sensitivity=0.2, enable_normalization=normalised)
    result = post(predictions([1.32, 1.34, 7.9, 8.1]))
    assert result.pred_label.tolist() == [False, True, True, True]  # 2 * 0.4 / 0.6 = 1.333
    assert result.pred_mask[:, 0, 0, 0].tolist() == [False, False, False, True]  # 2 * 0.8 / 0.2 = 8
    if not normalised:
        torch.testing.assert_close(result.pred_score, torch.tensor([1.32, 1.34, 7.9, 8.1]))


def test_batches_get_what_forward_gives() -> None:
    raw, post = predictions([1.0, 3.0]), processor()
    batch = ImageBatch(image=torch.rand(2, 3, 2, 3), pred_score=raw.pred_score, anomaly_map=raw.anomaly_map)
    batch.recognition = raw.recognition
    post.post_process_batch(batch)
    expected = post(raw)
    torch.testing.assert_close(batch.pred_score, expected.pred_score)
    torch.testing.assert_close(batch.anomaly_map, expected.anomaly_map[:, 0])
    assert torch.equal(batch.pred_label, expected.pred_label)
    assert torch.equal(batch.pred_mask, expected.pred_mask[:, 0])


BROKEN = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("normalised", [True, False])
def test_broken_scores_are_the_most_anomalous(normalised: bool) -> None:
    raw = predictions([1.0, *BROKEN])
    result = processor(enable_normalization=normalised)(raw)
    assert result.pred_label.tolist() == [False, True, True, True]
    assert (result.pred_score[1:] == (1 if normalised else math.inf)).all()
    torch.testing.assert_close(result.anomaly_map[:, 0, 0, 0], result.pred_score)
    assert result.pred_mask[:, 0, 0, 0].tolist() == result.pred_label.tolist()


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("name", ["_image_threshold", "_pixel_threshold"])
def test_a_broken_threshold_is_an_error(name: str, value: float) -> None:
    post = processor(enable_threshold_matching=False)
    post.get_buffer(name).fill_(value)
    with pytest.raises(ValueError, match="There is no threshold"):
        post(predictions([0.0]))


def test_no_warning_where_the_rate_is_just_met() -> None:
    """1/20 is a little more than 0.05 in float32."""
    for n, warned in ((19, 0), (18, 1)):
        post = processor(false_alarm_rate=0.05)
        post.begin(["part"], held=Scores.of(torch.rand(n), torch.rand(n), known(n)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            post.set_thresholds(SimpleNamespace(world_size=1))
        assert len(caught) == warned
        assert post.calibration_images.tolist() == [n]


def test_no_threshold_is_an_error() -> None:
    with pytest.raises(ValueError, match="There is no threshold: train the model, or load a trained checkpoint"):
        WTFlowPostProcessor()(predictions([1.0]))


def test_f1_is_anomalibs() -> None:
    ours, theirs = WTFlowPostProcessor(false_alarm_rate=None), PostProcessor()
    batch = ImageBatch(
        image=torch.rand(6, 3, 4, 4),
        pred_score=torch.tensor([0.1, 0.3, 0.2, 0.8, 0.9, 0.25]),
        anomaly_map=torch.rand(6, 4, 4),
        gt_label=torch.tensor([0, 0, 0, 1, 1, 1]),
        gt_mask=torch.rand(6, 4, 4) > 0.5,
    )
    for post in (ours, theirs):
        post.on_validation_batch_end(None, None, batch)
        post.on_validation_epoch_end(None, None)
    raw = InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map)
    for got, expected in zip(ours(raw), theirs(raw), strict=True):
        torch.testing.assert_close(got, expected)
    assert ours.image_threshold == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2.0, math.nan])
def test_rates_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match=f"false_alarm_rate is {rate}: choose a share between 0 and 1"):
        WTFlowPostProcessor(false_alarm_rate=rate)
    with pytest.raises(ValueError, match=f"calibration_ratio is {rate}"):
        get_settings(calibration_ratio=rate)


def test_settings_survive_a_checkpoint() -> None:
    config = WTFlowPostProcessor(false_alarm_rate=0.2, image_sensitivity=0.7).checkpoint_config()
    other = WTFlowPostProcessor()
    other.load_checkpoint_config(config)
    assert (other.false_alarm_rate, other.image_sensitivity) == (0.2, 0.7)
