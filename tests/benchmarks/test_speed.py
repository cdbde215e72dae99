"""The arithmetic of the benchmarks of speed: latency, training, start, GPU, couplings; and of precision."""

import sys

import pytest

from benchmarks import base, candidates, common, couplings, gpu, latency, precision, runtimes, startup, training
from benchmarks.candidates import Variant


def test_verdicts_come_from_the_json():
    ratios = dict.fromkeys((promise.text for promise in latency.PROMISES), 1.0)
    kept = [kept for kept, _ in latency.verdicts([{"promise": text, "ratio": r} for text, r in ratios.items()])]
    assert kept == [promise.least is None or promise.least <= 1 for promise in latency.PROMISES]


def test_turns_are_taken_and_the_first_round_is_not_counted():
    order: list[str] = []
    calls = {Variant(name): (lambda name=name: order.append(name)) for name in "ab"}
    seconds = candidates.interleaved(calls, rounds=3)
    turn = 1 + candidates.REPEATS
    assert "".join(order) == ("b" * turn + "a" * turn + "a" * turn + "b" * turn) * 2
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_ratio_is_the_median_of_the_rounds_ratios():
    a, b = Variant("a"), Variant("b")
    assert candidates.ratio({a: [10.0, 2.0, 3.0], b: [5.0, 1.0, 1.0]}, a, b) == 2.0  # of the medians: 3


def test_quartiles_are_those_of_one_image():
    line = candidates.summary(Variant("a", "torch", 2), [0.002, 0.004, 0.006], 2, digits=3)
    assert (line["model"], line["runtime"], line["batch"], line["rounds"]) == ("a", "torch", 2, 3)
    assert (line["ms_an_image"], line["quartiles_ms"]) == (2.0, [1.5, 2.5])


def test_each_variant_has_its_backbone_to_be_compared_with():
    grid = latency.grid()
    assert len(set(grid)) == len(grid)
    assert {variant._replace(model="backbone") for variant in grid} <= set(grid)
    assert set(candidates.EXPORTS) == set(runtimes.OPENERS)


@pytest.mark.slow
def test_an_exported_model_runs_without_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    _, path = candidates.load("backbone", "onnxruntime", tmp_path)
    measured = base.call(runtimes.first_result, str(path), "onnxruntime")  # asserts that torch is not there
    assert 20 < measured["peak_MiB"] < 500
    assert measured["first_result_seconds"] > 0


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
    text = training.render(measured)
    assert "image AUROC: 10 (at least 5) kept" in text  # 30 s against 3 s
    assert "peak memory: 0.75 (at most 1) kept" in text
    assert "backbone of an epoch: 0.05 (at most 0.1) kept" in text
    assert "never" not in text
    measured[0]["curve"] = [[1, 1.0, 0.7]]
    assert "image AUROC: never reached (at least 5) MISSED" in training.render(measured)
    command = {"seconds": 70.2, "after_imports": 61.4, "peak_MiB": 5, "curve": []}
    text = training.render([*measured, {"model": training.COMMAND, "data": "d", **command}])
    assert "| WTFlow, command | 70 s (61 s) |  |  | 5 MiB |  |" in text


def test_the_command_is_timed_from_its_start_and_from_the_imports(monkeypatch):
    def run(command, cwd):
        assert command[:3] == [sys.executable, "-c", training.TRAIN]
        assert command[3:] == [
            "train", "--model", "WTFlow", "--data", "MVTecAD", "--data.root",
            str(training.FOLDERS["mvtec_bottle"].resolve().parent), "--data.category", "bottle",
            "--trainer.max_epochs=1",
        ]  # fmt: skip
        assert cwd.is_dir()
        return {"after_imports": 1.0, "peak_MiB": 7}

    monkeypatch.setattr(training, "last_json", run)
    line = training.train_by_command("mvtec_bottle", "--trainer.max_epochs=1")
    assert line["seconds"] >= 0
    assert (line["after_imports"], line["peak_MiB"], line["curve"]) == (1.0, 7, [])
    given = common.parse("training", training, ["--data", "mvtec_bottle", "magnetic_tile"])
    plan = [gives for gives, _ in training.jobs(given)]
    assert [gives["data"] for gives in plan if gives["model"] == training.COMMAND] == ["mvtec_bottle"]


def test_precision_without_masks_speaks_of_images():
    names = ("torch", "f32", "bf16", "INT8")
    line = {"data": "d", "sizes_MiB": {"f32": 1.5}, "image_AUROC": dict.fromkeys(names, 0.9)}
    assert "| f32 | 0.9000 |  | 1.5 MiB |" in precision.render([line])
    assert "| bf16 | 0.9000 (+0.0000) |  |  |" in precision.render([line])
    assert [kept for kept, _ in precision.verdicts([line])] == [True, True]
    line["image_AUROC"]["INT8"] = 0.89
    assert [kept for kept, _ in precision.verdicts([line])] == [True, False]


def test_a_start_that_is_too_slow_is_missed():
    line = {"import_ms": 0.4, "plugin_ms": 100.0, "help_share": 0.02, "help_quartiles": [0.01, 0.03]}
    assert [kept for kept, _ in startup.verdicts([line])] == [True, False]
    assert [kept for kept, _ in startup.verdicts([{**line, "import_ms": 6.0, "help_share": 0.009}])] == [False, True]


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
    assert len({base.identity(line, gpu.KEY) for line in results}) == 3
    first, second = gpu.render(results).split("B, torch 2, c")
    assert "| WTFlow | eager | 0.500 (0.400 to 0.600) | 2000 | 25% |" in first
    assert "- outside the backbone, batch 1, eager: 25.0%" in first
    for table in (first, second):
        assert "| d | WTFlow | 16-mixed | 3.0 s | 5 MiB | 0.9000 | 0.8000 | 0.7000 |" in table
    assert "eager" not in second
    unmarked = {**trained, "metrics": {"image_AUROC": 0.9}, **card}
    assert "| 5 MiB | 0.9000 |  |  |" in gpu.render([unmarked])


def test_the_share_of_a_training_step_is_the_largest():
    def line(side, worst):
        return {"batch": 8, "side": side, "cost": {"worst": 1.01}, "seconds": {"worst": worst, "training step": 1.0}}

    assert couplings.verdicts([line(8, 0.01), line(16, 0.11)])[0][0] is False
    text = couplings.render([line(8, 0.01), line(16, 0.1)])
    assert "| worst | 10.0 (1.0%) | 1.010 | 100.0 (10.0%) |" in text
    assert "| training step | 1000.0 (100.0%) |  | 1000.0 (100.0%) |" in text
    assert "0.100 (at most 0.1) kept" in text
