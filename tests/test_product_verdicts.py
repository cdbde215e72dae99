"""Thresholds by product: what calibration does with unknown images, exact false-alarm rates, and graphs."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from scipy.stats import beta, gamma, kstest
from torch import nn

from anomalib_wtflow import WTFlowPostProcessor
from anomalib_wtflow.post_processor import Scored
from anomalib_wtflow.products import Recognition

RATE = 0.1


def test_unknown_images_of_one_product_change_its_threshold_alone() -> None:
    """20 scores each: floor(0.1 x 21) = 2 of 21 may exceed, so it is the 19th smallest, infinite ones included."""
    product = torch.arange(2).repeat(20)
    scores = torch.stack([torch.randperm(20), 100 + torch.randperm(20)], dim=1).float().flatten()
    peaks = 2 * scores
    post = WTFlowPostProcessor(RATE)
    post.calibrate(scores, peaks, product, 2)
    assert post.image_threshold.tolist() == [18, 118]
    assert post.pixel_threshold.tolist() == [36, 236]
    # The smallest of the second is like no product: above any threshold, so one other less may be.
    post.calibrate(scores.masked_fill(scores == 100, torch.inf), peaks, product, 2)
    assert post.image_threshold.tolist() == [18, 119]
    assert post.pixel_threshold.tolist() == [36, 236]
    assert post.effective_false_alarm_rate.tolist() == pytest.approx([2 / 21] * 2)
    too_many = (scores == 100) | (scores == 101)
    with pytest.raises(ValueError, match=r"^20 scores of normal images, 2 of them NaN or infinite, give no threshold"):
        post.calibrate(scores.masked_fill(too_many, torch.inf), peaks, product, 2)


def test_each_product_needs_scores() -> None:
    with pytest.raises(ValueError, match=r"^0 scores of normal images"):
        WTFlowPostProcessor(RATE).calibrate(torch.rand(9), torch.rand(9), torch.arange(9) % 2, 3)
    broken = torch.rand(9).index_fill(0, torch.tensor([4]), torch.nan)
    with pytest.raises(ValueError, match="1 of them NaN or infinite"):
        WTFlowPostProcessor(RATE).calibrate(broken, torch.rand(9), torch.arange(9) % 3, 3)


def test_products_of_different_numbers_of_images() -> None:
    """Each has the rate that its own number of images allows."""
    counts, post = (4, 19, 99), WTFlowPostProcessor(RATE)
    product = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    scores = torch.cat([torch.arange(1.0, count + 1) for count in counts])
    order = torch.randperm(len(scores))
    post.calibrate(scores[order], scores[order], product[order], 3)
    assert post.image_threshold.tolist() == [4, 18, 90]
    assert post.effective_false_alarm_rate.tolist() == pytest.approx([1 / 5, 2 / 20, 10 / 100])


def test_more_products_take_the_place_of_fewer() -> None:
    """And fewer that of more: calibrated again, or loaded."""
    one, three = WTFlowPostProcessor(RATE), WTFlowPostProcessor(RATE)
    one.calibrate(torch.arange(9.0), torch.arange(9.0))
    three.calibrate(torch.arange(27.0), torch.arange(27.0) + 1, torch.arange(27) % 3, 3)
    state = {name: tensor.clone() for name, tensor in three.state_dict().items()}
    raw = Scored(20 * torch.rand(3), 20 * torch.rand(3, 1, 4, 4), torch.tensor([2, 0, 1]), torch.tensor([0.1, 0.2, 4]))
    expected = three(raw)
    three.load_state_dict(one.state_dict())
    assert three.image_threshold.tolist() == [8]
    one.load_state_dict(state)
    for name in WTFlowPostProcessor.per_product:
        assert torch.equal(one.get_buffer(name), state[name])
        assert len(state[name]) == 3
    for got, wanted in zip(one(raw), expected, strict=True):
        assert torch.equal(got, wanted)


class Graph(nn.Module):
    """The post-processor, with tensors for arguments."""

    def __init__(self, post_processor: WTFlowPostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, *predictions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.post_processor(Scored(*predictions)))


def test_graphs_batches_and_modules_judge_alike() -> None:
    """With good, anomalous and unknown images of three products."""
    post = WTFlowPostProcessor(RATE, image_sensitivity=0.4, pixel_sensitivity=0.6)
    product = torch.arange(60) % 3
    scores = torch.rand(60) * 10.0**product
    post.calibrate(scores, scores, product, 3)
    u = torch.where(torch.arange(60) % 5 == 0, 3.0, 0.5)
    anomaly_map = 2 * scores[:, None, None, None] * torch.rand(60, 1, 6, 5)
    raw = Scored(1.5 * scores, anomaly_map, product, u)
    module = post(raw)
    graph = torch.export.export(Graph(post), tuple(raw)).module()(*raw)
    batch = ImageBatch(image=torch.rand(60, 3, 6, 5), pred_score=raw.pred_score, anomaly_map=raw.anomaly_map)
    batch.recognition = Recognition(product, u)  # type: ignore[attr-defined]
    post.post_process_batch(batch)
    for name, exported in zip(module._fields, graph, strict=True):
        assert torch.equal(exported, getattr(module, name)), name
        assert torch.equal(getattr(batch, name).flatten(), getattr(module, name).flatten()), name
    called = module.pred_label
    assert called[u > 1].all()
    assert 0.05 < called[u < 1].float().mean() < 0.95
    assert torch.equal(called, (module.pred_score > 0.6) | (u > 1))


def test_a_broken_image_is_anomalous_in_a_graph() -> None:
    """Its score and its distances are NaN, and the product that comes of it may be any."""
    post = WTFlowPostProcessor(RATE)
    post.calibrate(torch.rand(60), torch.rand(60), torch.arange(60) % 3, 3)
    raw = Scored(torch.zeros(2), torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]), torch.zeros(2))
    graph = torch.export.export(Graph(post), tuple(raw)).module()
    nan = torch.tensor([torch.nan, 0.0])
    result = graph(nan, nan[:, None, None, None].expand(2, 1, 2, 2).contiguous(), raw.product, nan)
    assert result[1].tolist() == [True, False]
    assert result[3].flatten(1).all(1).tolist() == [True, False]


def test_the_false_alarm_rate_has_the_distribution_that_theory_says() -> None:
    """Of images recognised as each product, over 200 draws: ``Beta(k, n + 1 - k)``, k = 4 of n = 40 may exceed.

    One image in ten is taken for the other product, and one in 200 is like none. Scores are drawn from gamma
    distributions, so the rate beyond a threshold is known exactly. The draws tell this distribution from that of the
    next rank, and from what one threshold for both products gives.
    """
    rng, draws, n, k, mixed, unknown = np.random.default_rng(4), 200, 40, 4, 0.1, 0.005
    post, pooled = WTFlowPostProcessor(RATE), WTFlowPostProcessor(RATE)
    shapes, scales = np.array([2.0, 3.0]), np.array([1.0, 3.0])

    def beyond(threshold: float, place: int) -> float:
        tails = gamma(shapes, scale=scales).sf(threshold)
        return unknown + (1 - unknown) * ((1 - mixed) * tails[place] + mixed * tails[1 - place])

    rates: dict[str, list[list[float]]] = {"own": [[], []], "pooled": [[], []]}
    for _ in range(draws):
        seen = np.repeat([0, 1], n)
        true = np.where(rng.random(2 * n) < mixed, 1 - seen, seen)
        scores = rng.gamma(shapes[true], scales[true])
        scores[rng.random(2 * n) < unknown] = np.inf
        shown, order = torch.from_numpy(scores), torch.from_numpy(rng.permutation(2 * n))
        product = torch.from_numpy(seen)
        post.calibrate(shown[order], shown[order], product[order], 2)
        pooled.calibrate(shown, shown)
        for place in (0, 1):
            rates["own"][place].append(beyond(float(post.image_threshold[place]), place))
            rates["pooled"][place].append(beyond(float(pooled.image_threshold[0]), place))
    promised = beta(k, n + 1 - k)
    low, high = promised.interval(0.95)
    for place in (0, 1):
        own = np.array(rates["own"][place])
        assert kstest(own, promised.cdf).pvalue > 0.001
        for other in (k - 1, k + 1):
            assert kstest(own, beta(other, n + 1 - other).cdf).pvalue < 1e-4
        assert ((low < own) & (own < high)).mean() == pytest.approx(0.95, abs=0.05)  # three deviations of 200 draws
        assert kstest(rates["pooled"][place], promised.cdf).pvalue < 1e-6
    assert np.mean(rates["pooled"][1]) > RATE
