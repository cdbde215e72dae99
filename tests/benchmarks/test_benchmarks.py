"""The benchmark's own arithmetic: it decides the figures that the README shows."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_wtflow.features.backbone import FeatureExtractor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablation
import accuracy
import contribution
import gpu
import latency
import lines
import rows
import startup

import training


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
    network, memo = Doubling(), rows.Memo()
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
    rows.Memo(limit=0).wrap(network)
    network(torch.ones(1, 3, 4, 4))
    network(torch.ones(1, 3, 4, 4))
    assert network.seen == 2


def test_memo_does_not_mix_networks():
    first, second, memo = Doubling(), Doubling(), rows.Memo()
    second.weight.fill_(3.0)
    memo.wrap(first)
    memo.wrap(second)
    image = torch.ones(1, 3, 4, 4)
    assert first(image)[0].unique() == 2
    assert second(image)[0].unique() == 3


def test_memo_tells_the_layers_of_one_backbone_apart():
    memo, image = rows.Memo(), torch.randn(1, 3, 64, 64)
    for layers in (["blocks.2", "blocks.4"], ["blocks.4"]):
        network = FeatureExtractor(layers=layers).network
        expected = network(image)
        memo.wrap(network)
        assert len(network(image)) == len(layers)
        assert torch.equal(network(image)[-1], expected[-1])


def test_squash_keeps_ranks_of_large_scores():
    scores = torch.tensor([-500.0, -1.0, 0.0, 1e-3, 1.0, 40.0, 40.001, 5000.0])
    batch = ImageBatch(
        image=torch.zeros(8, 3, 2, 2), pred_score=scores, anomaly_map=scores[:, None, None].repeat(1, 2, 2)
    )
    rows.Squash(enable_normalization=False, enable_thresholding=False).post_process_batch(batch)
    assert (batch.pred_score.diff() > 0).all()
    assert batch.pred_score.min() > 0
    assert batch.pred_score.max() < 1
    assert torch.equal(batch.anomaly_map[:, 0, 0], batch.pred_score)


def test_no_row_peeks_or_shares_a_name():
    assert set(accuracy.QUICK) <= {(row, "mvtec_bottle", 0) for row in rows.ROWS}
    for row in ("No flow", "WTFlow", "Nearest neighbour"):
        model, _ = rows.build(row, "synthetic", None)
        names = model.model.feature_extractor.network.feature_info.module_name()
        assert names == ["blocks.1", "blocks.2", "blocks.4"]
    assert rows.LAYERS == ("blocks.2", "blocks.4")


def test_no_flow_is_the_identity():
    model, _ = rows.build("No flow", "synthetic", None)
    x0 = torch.randn(1, model.model.feature_extractor.out_channels, 4, 4)
    assert torch.equal(model.model.flow(x0), x0)
    assert not any(p.requires_grad for p in model.parameters())


def test_nearest_neighbour_against_brute_force():
    model, _ = rows.build("Nearest neighbour", "synthetic", None)
    channels = model.model.feature_extractor.out_channels
    model.model.normalization = nn.Identity()
    bank, features = torch.randn(40, channels), torch.randn(2, channels, 16, 16)
    model.bank = [bank[:10], bank[10:]]
    distance = torch.cdist(features.movedim(1, -1).flatten(0, -2), bank).amin(1).view(2, 1, 16, 16)
    expected = torch.log1p(2 * distance.square() / channels)
    result = model.model.predict(features, (32, 32))
    generator = model.model.anomaly_map_generator
    window = torch.nn.functional.avg_pool2d(expected, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(result.pred_score, generator.score(window), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.anomaly_map, generator(-expected, (32, 32))[0], rtol=1e-4, atol=1e-4)


def test_unknown_data_set():
    with pytest.raises(FileNotFoundError, match="no data set 'bottles'"):
        rows.data_module("bottles")


def test_results_survive_a_line_that_was_cut_short(tmp_path):
    line = {"model": "WTFlow", "data": "x", "seed": 0, "settings": {}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    assert lines.read(path) == [line]
    lines.append(path, line)
    assert lines.read(path) == [line, line]


def test_table_shows_mean_and_spread():
    runs = [
        {
            "model": "WTFlow", "data": "d", "seed": seed, "settings": {}, "train_images": 1, "test_images": 2,
            "metrics": dict.fromkeys(accuracy.METRICS, value), "parameters": 1_500_000, "fit_seconds": 10 + seed,
        }
        for seed, value in enumerate((0.90, 0.92))
    ]  # fmt: skip
    assert "| WTFlow | 2 | 0.9100 ± 0.0141 |" in accuracy.tables(runs)
    assert "| 1.50 M | 10 s |" in accuracy.tables(runs)


def test_best_f1_against_all_thresholds():
    generator = np.random.default_rng(0)
    label, score = generator.random(50) > 0.6, generator.random(50).round(1)
    brute = max(2 * (label & (score >= t)).sum() / ((score >= t).sum() + label.sum()) for t in np.unique(score))
    assert ablation.best_f1(label, score) == pytest.approx(brute)


def test_blocks_cut_the_maps_without_losing_a_position():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    parts = ablation.split(x, 2)
    assert parts.shape == (8, 3, 2, 2)
    assert torch.equal(parts[1], x[0, :, :2, 2:])
    assert torch.equal(parts[6], x[1, :, 2:, :2])


def test_mean_ranks():
    results = [
        {"label": label, "data": data, "metrics": dict.fromkeys(ablation.METRICS, value)}
        for data in ablation.SETS
        for label, value in (("a", 0.9), ("b", 0.8), ("c", 0.9))
    ]
    assert ablation.mean_ranks(results) == {"a": 1.5, "b": 3.0, "c": 1.5}


def measured(setting, rank, parameters=1000, seconds=10.0):
    return [
        {
            "label": str(setting), "data": data, "setting": ablation.jsonable(setting), "parameters": parameters,
            "metrics": dict.fromkeys(ablation.METRICS, 1 - 0.1 * rank), "seconds": seconds,
        }
        for data in ablation.SETS
    ]  # fmt: skip


def test_the_rule_takes_the_best_rank_within_the_bounds():
    base = ablation.START
    wide, slow, unet = replace(base, width=512), replace(base, epochs=500), replace(base, network="unet")
    results = (
        measured(base, 3) + measured(wide, 2, 2000) + measured(slow, 1, seconds=301) + measured(unet, 0, 6_000_000)
    )
    assert ablation.winner(results, base) == wide


def test_the_rule_breaks_ties_by_parameters_then_computation_then_the_base():
    base = ablation.START
    small, long, fine = replace(base, width=128), replace(base, epochs=160), replace(base, side=32)
    assert ablation.winner(measured(base, 1, 2000) + measured(small, 1, 1000), base) == small
    assert ablation.winner(measured(long, 1) + measured(fine, 1) + measured(base, 1), base) == base
    other = replace(base, coupling="optimal")
    assert ablation.winner(measured(other, 1) + measured(base, 1), base) == base


def test_a_factor_is_ranked_at_its_own_start_time():
    base = replace(ablation.START, start_time=0.3)
    lines = [
        {**line, "factor": "time"}
        for blocks in (1, 2)
        for start_time in (None, 0.3, 0.4)
        for line in measured(replace(base, blocks=blocks, start_time=start_time), blocks)
    ]
    ranked = ablation.of_factor(lines, "time", base)
    assert {line["label"] for line in ranked} == {"blocks=1", "blocks=2"}
    assert {line["setting"]["start_time"] for line in ranked} == {base.start_time}
    assert ablation.times("time", base) == [0.3]
    assert ablation.times("pool", base) == [None, 0.3]
    assert ablation.times("start", replace(base, start_time=0.7)) == [0.7]


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


def test_a_promise_holds_up_to_its_limits():
    between = latency.Promise("a / b", latency.one("a"), latency.one("b"), least=0.97, most=1.03)
    assert [between.verdict(r)[0] for r in (0.969, 0.97, 1.0, 1.03, 1.031)] == [False, True, True, True, False]
    kept, text = latency.Promise("a / b", latency.one("a"), latency.one("b"), most=1.15).verdict(1.2)
    assert not kept
    assert text == "a / b: 1.200 (at most 1.15) MISSED"


def test_verdicts_come_from_the_json():
    ratios = dict.fromkeys((promise.text for promise in latency.PROMISES), 1.0)
    kept = [kept for kept, _ in latency.verdicts([{"promise": text, "ratio": r} for text, r in ratios.items()])]
    assert kept == [promise.least is None or promise.least <= 1 for promise in latency.PROMISES]


def test_turns_are_taken_and_the_first_round_is_not_counted():
    order: list[str] = []
    calls = {latency.one(name): (lambda name=name: order.append(name)) for name in "ab"}
    seconds = latency.interleaved(calls, rounds=3)
    turn = 1 + latency.REPEATS
    assert "".join(order) == ("b" * turn + "a" * turn + "a" * turn + "b" * turn) * 2
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_ratio_is_the_median_of_the_rounds_ratios():
    a, b = latency.one("a"), latency.one("b")
    assert latency.ratio({a: [10.0, 2.0, 3.0], b: [5.0, 1.0, 1.0]}, a, b) == 2.0  # of the medians: 3


def test_training_is_compared_at_fastflows_best():
    def line(model, seconds, peak, epoch, curve):
        machine = {"cpu": "c", "threads": 2}
        line = {"model": model, "data": "d", "seconds": seconds, "peak_MiB": peak, "epoch_seconds": epoch}
        return {**line, "epochs": 2, "curve": curve, "machine": machine}

    measured = [
        line("WTFlow", 4, 90, 0.5, [[1, 1.0, 0.7], [2, 2.0, 0.8], [4, 3.0, 0.95]]),
        line("WTFlow, no cache", 9, 90, 10.5, []),
        line("FastFlow", 90, 300, 9, [[1, 10.0, 0.6], [2, 30.0, 0.9], [3, 50.0, 0.85]]),
        line("Patchcore", 50, 120, None, []),
    ]
    assert training.reached(measured[0]["curve"], 0.9) == 3.0
    assert training.reached(measured[0]["curve"], 0.99) is None
    text = training.tables(measured)
    assert "image AUROC: 10 (at least 5) kept" in text  # 30 s against 3 s
    assert "peak memory: 0.75 (at most 1) kept" in text
    assert "backbone of an epoch: 0.05 (at most 0.1) kept" in text
    assert "never" not in text


def test_a_start_that_is_too_slow_is_missed():
    line = {"import_ms": 0.4, "plugin_ms": 100.0, "help_share": 0.02, "help_quartiles": [0.01, 0.03]}
    assert [kept for kept, _ in startup.verdicts(line)] == [True, False]
    assert [kept for kept, _ in startup.verdicts({**line, "import_ms": 6.0, "help_share": 0.009})] == [False, True]


def test_gpu_tables_keep_cards_and_data_apart():
    card = {"gpu": "A", "torch": "2", "cpu": "c"}
    timed = {"model": "WTFlow", "runtime": "eager", "batch": 1, "ms_an_image": 0.5, "quartiles_ms": [0.4, 0.6]}
    metrics = {"image_AUROC": 0.9, "pixel_AUROC": 0.8, "pixel_AUPRO": 0.7}
    trained = {"model": "WTFlow", "data": "d", "precision": "16-mixed", "seconds": 3.0, "peak_MiB": 5}
    results = [
        {**timed, "outside_backbone": 0.25, **card},
        {**trained, "metrics": metrics, **card},
        {**trained, "metrics": metrics, **card, "gpu": "B"},
    ]
    assert len({gpu.key(line) for line in results}) == 3
    first, second = gpu.tables(results).split("B, torch 2, c")
    assert "| WTFlow | eager | 0.500 (0.400 to 0.600) | 2000 | 25% |" in first
    assert "- outside the backbone, batch 1, eager: 25.0%" in first
    for table in (first, second):
        assert "| d | WTFlow | 16-mixed | 3.0 s | 5 MiB | 0.9000 | 0.8000 | 0.7000 |" in table
    assert "eager" not in second
