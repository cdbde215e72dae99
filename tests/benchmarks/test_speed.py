"""The arithmetic of the benchmarks of speed: latency, training and growth."""

import sys

import pytest
import torch

from benchmarks import base, candidates, common, growth, latency, runtimes, training
from benchmarks.candidates import Variant


def test_turns_are_taken_and_the_first_round_is_not_counted():
    order: list[str] = []
    calls = {Variant(name): (lambda name=name: order.append(name)) for name in "ab"}
    seconds = candidates.interleaved(calls, rounds=3)
    turn = 1 + candidates.REPEATS
    assert "".join(order) == ("b" * turn + "a" * turn + "a" * turn + "b" * turn) * 2
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_figures_are_medians_of_the_rounds():
    a, b = Variant("a"), Variant("b")
    assert candidates.ratio({a: [10.0, 2.0, 3.0], b: [5.0, 1.0, 1.0]}, a, b) == 2.0  # of the medians: 3
    line = candidates.summary(Variant("a", "torch", 2), [0.002, 0.004, 0.006], 2, digits=3)
    assert (line["model"], line["runtime"], line["batch"], line["rounds"]) == ("a", "torch", 2, 3)
    assert (line["ms_an_image"], line["quartiles_ms"]) == (2.0, [1.5, 2.5])


def test_each_variant_has_its_backbone_to_be_compared_with():
    grid = latency.grid()
    assert len(set(grid)) == len(grid)
    assert {variant._replace(model="backbone") for variant in grid} <= set(grid)
    assert set(candidates.EXPORTS) == set(runtimes.OPENERS)
    ratios = dict.fromkeys((promise.text for promise in latency.PROMISES), 1.0)
    kept = [kept for kept, _ in latency.verdicts([{"promise": text, "ratio": r} for text, r in ratios.items()])]
    assert kept == [promise.least is None for promise in latency.PROMISES]


@pytest.mark.slow
def test_an_exported_model_runs_without_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    _, path = candidates.load("backbone", "onnxruntime", tmp_path)
    measured = base.call(runtimes.first_result, str(path), "onnxruntime")  # asserts that torch is not there
    assert 20 < measured["peak_MiB"] < 500
    assert measured["first_result_seconds"] > 0


def test_training_is_compared_with_a_plain_pass_and_with_others():
    def line(model, seconds, peak, **more):
        machine = {"cpu": "c", "threads": 2}
        return {"model": model, "data": "d", "seconds": seconds, "peak_MiB": peak, "machine": machine, **more}

    measured = [
        line("WTFlow", 20, 90, fit_seconds=12.0, pass_seconds=8.0),
        line(training.COMMAND, 60, 70, after_imports=51.4, pass_seconds=8.0),
        line("FastFlow", 90, 300),
        line("Patchcore", 50, 120),
    ]
    text = training.render(measured)
    assert "| WTFlow | 20 s | 12.0 s | 1.50 | 2.50 | 8.0 s | 90 MiB |" in text
    assert "| WTFlow, command | 60 s (51 s) |  |  | 7.50 | 8.0 s | 70 MiB |" in text
    assert "seconds: 4.5 (at least 5) MISSED" in text
    assert "memory: 0.75 (at most 1) kept" in text
    assert "plain pass of its images: 7.5 (at most 8) kept" in text


def test_the_command_is_timed_from_its_start_and_from_the_imports(monkeypatch):
    def run(command, cwd):
        assert command[:3] == [sys.executable, "-c", training.TRAIN]
        assert command[3:] == [
            "train", "--model", "WTFlow", "--data", "MVTecAD", "--data.root",
            str(training.FOLDERS["mvtec_bottle"].resolve().parent), "--data.category", "bottle", "--seed_everything=1",
        ]  # fmt: skip
        del cwd
        return {"after_imports": 1.0, "peak_MiB": 7}

    monkeypatch.setattr(training, "last_json", run)
    line = training.train_by_command("mvtec_bottle", "--seed_everything=1")
    assert (line["after_imports"], line["peak_MiB"]) == (1.0, 7)
    given = common.parse("training", training, ["--data", "mvtec_bottle", "magnetic_tile"])
    plan = [gives for gives, _ in training.jobs(given)]
    assert [gives["data"] for gives in plan if gives["model"] == training.COMMAND] == ["mvtec_bottle"]


def test_a_budget_of_growth_holds_as_many_images_as_it_says():
    row = growth.noise(torch.zeros(1, 3, 256, 256))
    assert row.numel() * row.element_size() == growth.ROW_BYTES
    lines = [{"part": "images", "count": count, "MiB": mib} for count, mib in ((25_000, 1000), (100_000, 1099))]
    assert growth.verdicts(lines)[0][0] is True
    assert growth.verdicts([lines[0], {**lines[1], "MiB": 1101}])[0][0] is False
