"""The table of verdicts, against anomalib's own predictions."""

import csv
import errno
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from rich.console import Console
from torch.utils.data import DataLoader

from anomalib_wtflow import WTFlow, WTFlowPostProcessor
from anomalib_wtflow.products import UNKNOWN, Recognition
from anomalib_wtflow.reporting.summary import Summary, sentences, show
from anomalib_wtflow.reporting.verdicts import COLUMNS, Verdicts, locked, read, reason, rows_of, stopped, to_json
from conftest import quiet_engine


def judged(root: Path, trained: SimpleNamespace, **kwargs: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Predict the test images; return anomalib's batches and the rows of the file."""
    model = WTFlow.load_from_checkpoint(trained.checkpoint, **kwargs).eval()
    batches = quiet_engine(root).predict(model, dataset=PredictDataset(trained.parts.root / "test"))
    return batches, list(read(next(root.rglob("scores.csv"))))


@pytest.mark.slow
def test_rows_are_anomalibs_predictions(tmp_path: Path, trained: SimpleNamespace) -> None:
    batches, rows = judged(tmp_path, trained)
    assert [row["image_path"] for row in rows] == [path for batch in batches for path in batch.image_path]
    assert len(rows) == 32
    scores = torch.cat([batch.pred_score for batch in batches]).flatten()
    torch.testing.assert_close(torch.tensor([row["pred_score"] for row in rows]), scores, rtol=0, atol=0)
    labels = torch.cat([batch.pred_label for batch in batches]).flatten().tolist()
    assert [row["pred_label"] for row in rows] == ["anomalous" if label else "good" for label in labels]
    assert len(set(labels)) == 2
    maps, masks = (torch.cat([getattr(b, name) for b in batches]).flatten(1) for name in ("anomaly_map", "pred_mask"))
    torch.testing.assert_close(torch.tensor([row["largest_pixel"] for row in rows]), maps.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.tensor([row["outlined"] for row in rows]), masks.float().mean(1), rtol=0, atol=1e-8
    )
    threshold = float(trained.model.post_processor.image_threshold)
    for row in rows:
        assert row["threshold"] == pytest.approx(threshold, rel=1e-7)
        assert row["pred_score"] == pytest.approx(row["raw_score"] / (row["raw_score"] + threshold), rel=1e-6)
        assert row["gt_label"] is None
        assert "product" not in row


@pytest.mark.slow
def test_a_test_knows_the_truth_and_the_json_file_has_the_rows(
    tmp_path: Path, trained: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    model = WTFlow.load_from_checkpoint(trained.checkpoint).eval()
    quiet_engine(tmp_path).test(model, datamodule=trained.parts, verbose=False)
    path = next(tmp_path.rglob("scores.csv"))
    rows, whole = list(read(path)), json.loads(path.with_suffix(".json").read_text())
    assert whole["images"] == rows
    samples = trained.parts.test_data.samples.set_index("image_path")["label_index"].to_dict()
    assert {row["image_path"]: row["gt_label"] for row in rows} == {
        path: ("anomalous" if label else "good") for path, label in samples.items()
    }
    pairs = [(row["gt_label"], row["pred_label"]) for row in rows]
    summary = whole["summary"]
    assert summary["images"] == len(samples)
    assert summary["false_alarms"] == pairs.count(("good", "anomalous"))
    assert summary["misses"] == pairs.count(("anomalous", "good"))
    assert f"{len(samples)} images: {summary['good']} good, {summary['anomalous']} anomalous" in capsys.readouterr().out


@pytest.mark.slow
def test_they_can_be_switched_off(tmp_path: Path, trained: SimpleNamespace) -> None:
    overrides = {**{k: getattr(trained.model.settings, k) for k in ("coupling", "plateau")}, "verdicts": False}
    with pytest.raises(StopIteration):
        judged(tmp_path, trained, overrides=overrides)


@pytest.mark.slow
def test_good_images_only_have_no_auroc(
    tmp_path: Path, trained: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    root = trained.parts.root
    good = Folder("good", "train/good", root, normal_test_dir="test/good", test_split_mode="from_dir", num_workers=0)
    model = WTFlow.load_from_checkpoint(trained.checkpoint).eval()
    metrics = len(model.evaluator.test_metrics)
    (result,) = quiet_engine(tmp_path).test(model, datamodule=good, verbose=False)
    assert result == {}
    assert len(model.evaluator.test_metrics) == metrics > 0
    out = capsys.readouterr().out
    assert "There are no defective images, so AUROC and F1 cannot be measured" in out
    promised = float(trained.model.post_processor.effective_false_alarm_rate)
    assert f"called anomalous, at most {promised:.1%} promised." in out


# Without a model -----------------------------------------------------------------------------------------------------


def several() -> tuple[Any, ImageBatch]:
    """Three images of a model of two products, the last one of neither."""
    post = WTFlowPostProcessor(0.5)
    post.calibrate(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0]), torch.tensor([0, 1]), 2)
    names = ["bolt", "nut"]
    model = SimpleNamespace(
        post_processor=post,
        product_names=names,
        recognised=lambda known: [
            UNKNOWN if s > 1 else names[p]
            for p, s in zip(known.product.tolist(), known.strangeness.tolist(), strict=True)
        ],
    )
    raw = torch.tensor([3.0, 3.0, 0.5])
    batch = ImageBatch(
        image=torch.zeros(3, 3, 2, 2),
        pred_score=raw.clone(),
        anomaly_map=torch.tensor([0.5, 0.5, 2.0])[:, None, None, None].expand(3, 1, 2, 2).contiguous(),
        image_path=["a.png", "ü,b.png", "c.png"],
    )
    batch.recognition = Recognition(torch.tensor([0, 1, 0]), torch.tensor([0.1, 0.1, 4.0]))
    batch.raw_score = raw
    post.post_process_batch(batch)
    return model, batch


def test_each_image_has_the_threshold_of_its_product() -> None:
    rows = rows_of(*several())
    assert list(rows[0]) == list(COLUMNS)
    assert [row["product"] for row in rows] == ["bolt", "nut", UNKNOWN]
    assert [row["threshold"] for row in rows] == [1.0, 4.0, 1.0]
    assert [row["pred_label"] for row in rows] == ["anomalous", "good", "anomalous"]
    assert [row["raw_score"] for row in rows] == [3.0, 3.0, 0.5]
    expected = [3 / 4, 3 / 7, 4 / 5]  # the last by its strangeness: 4 thresholds
    assert [row["pred_score"] for row in rows] == pytest.approx(expected, rel=1e-7)
    assert [row["largest_pixel"] for row in rows] == pytest.approx([1 / 3, 1 / 3, 2 / 3], rel=1e-7)
    assert [row["outlined"] for row in rows] == [0.0, 0.0, 1.0]


def test_files_hold_any_name_and_the_summary_counts(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    rows = rows_of(*several())
    for row, truth in zip(rows, ("good", "anomalous", ""), strict=True):
        row["gt_label"] = truth
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    summary = to_json(path, Summary(promises={"bolt": 0.5, "nut": 0.25}))
    assert [row["image_path"] for row in read(path)] == ["a.png", "ü,b.png", "c.png"]
    assert (summary.images, summary.good, summary.anomalous, summary.unknown) == (3, 1, 2, 1)
    assert (summary.truly_good, summary.false_alarms, summary.truly_anomalous, summary.misses) == (1, 1, 1, 1)
    assert [row["image_path"] for row in summary.highest] == ["c.png", "a.png", "ü,b.png"]
    assert summary.scores == pytest.approx([3 / 7, 3 / 4, 4 / 5])
    assert sentences(summary)[0] == "3 images: 1 good, 2 anomalous (1 of them like no product)."
    assert sentences(summary)[1] == "Of 1 good ones 1 called anomalous, at most 50.0% promised."


def test_what_has_no_score_comes_first_and_is_not_good(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(",".join(COLUMNS) + "\na.png,,1,0.9,1,anomalous,,1,1\nb.png,,,,,,,,\n")
    summary = to_json(path, Summary())
    assert summary.highest[0]["image_path"] == "b.png"
    assert (summary.good, summary.anomalous) == (0, 2)
    assert summary.scores[-1] == math.inf


def test_a_file_of_many_rows_is_summed_up_like_the_ten_highest(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    order = torch.randperm(500).tolist()
    lines = [f"{k}.png,,{k},{k / 500},250,{'good' if k < 250 else 'anomalous'},,0,0" for k in order]
    path.write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    summary = to_json(path, Summary())
    assert [row["image_path"] for row in summary.highest] == [f"{k}.png" for k in range(499, 489, -1)]
    assert (summary.good, summary.anomalous) == (250, 250)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed(terminal: bool, tmp_path: Path) -> None:
    row = {"image_path": "parts/[red]a.png", "pred_score": 0.75, "pred_label": "anomalous", "gt_label": None}
    summary = Summary(images=2, judged=2, good=1, anomalous=1, scores=[0.25, 0.5, 0.75], highest=[row])
    out = io.StringIO()
    show(
        summary,
        tmp_path / "scores.csv",
        Console(file=out, force_terminal=terminal, width=200, highlight=False, markup=False),
    )
    text = out.getvalue()
    for part in ("2 images: 1 good, 1 anomalous.", "0.7500", "parts/[red]a.png", "scores.csv and scores.json"):
        assert part in text
    assert ("───" in text or "━" in text) == terminal


def test_a_promise_needs_good_and_defective_images() -> None:
    assert not any("AUROC" in line for line in sentences(Summary(images=2, judged=2, truly_good=1, truly_anomalous=1)))
    assert any("no good images" in line for line in sentences(Summary(images=1, judged=1, truly_anomalous=1)))
    assert not any("AUROC" in line for line in sentences(Summary(images=1, judged=1)))
    assert sentences(Summary(images=3)) == ["3 images without verdicts: the model has no threshold."]


def test_images_that_were_left_out_are_counted() -> None:
    rest = "3 of 40 images were judged, since limit_predict_batches is 3: the others have no verdict."
    some = {"images": 3, "reason": "limit_predict_batches is 3"}
    assert sentences(Summary(given=40, judged=3, good=3, **some)) == ["3 images: 3 good, 0 anomalous.", rest]
    assert sentences(Summary(given=40, **some)) == ["3 images without verdicts: the model has no threshold.", rest]
    for given in (None, 3, 2):  # a sampler may show images twice
        assert sentences(Summary(given=given, judged=3, good=3, **some)) == ["3 images: 3 good, 0 anomalous."]


def test_a_file_takes_the_verdicts_of_one_run_at_a_time(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        default_root_dir=tmp_path,
        global_rank=0,
        world_size=1,
        predicting=True,
        predict_dataloaders=[SimpleNamespace(dataset=[1, 2])],
    )
    model = SimpleNamespace(product_names=[""])
    first, second = Verdicts(), Verdicts()
    first._start(trainer, model)
    with pytest.raises(RuntimeError, match=rf"^Another run .* to {tmp_path}/scores.csv: wait .* --default_root_dir\.$"):
        second._start(trainer, model)
    first.on_exception(trainer, model, KeyboardInterrupt())
    second._start(trainer, model)
    second.teardown(trainer, model, "predict")


def test_each_process_keeps_its_own_file_to_itself(tmp_path: Path) -> None:
    """One of a second run would empty what the first run's writes."""
    model = SimpleNamespace(product_names=[""])
    trainers: Any = [SimpleNamespace(default_root_dir=tmp_path, global_rank=rank) for rank in (0, 1, 1)]
    first, second, late = Verdicts(), Verdicts(), Verdicts()
    first._start(trainers[0], model)
    second._start(trainers[1], model)
    with pytest.raises(RuntimeError, match=rf"^Another run is writing its verdicts to {tmp_path}/scores-1.csv: wait"):
        late._start(trainers[2], model)
    for each in (first, second):
        each.teardown(trainers[0], model, "test")


def test_a_folder_that_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: it works as before, with a warning."""

    def refused(lock: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("anomalib_wtflow.reporting.verdicts.FileLock.acquire", refused)
    with pytest.warns(UserWarning, match=r"takes no lock \(\[Errno \d+\] No locks available\): start no second run"):
        assert locked(tmp_path / "scores.csv") is None


def test_why_images_were_left_out() -> None:
    def said(predicting: bool, limit: float) -> str:
        trainer: Any = SimpleNamespace(predicting=predicting, limit_predict_batches=limit, limit_test_batches=limit)
        return reason(trainer)

    assert said(True, 1) == "limit_predict_batches is 1"
    assert said(False, 0.25) == "limit_test_batches is 0.25"
    assert said(True, 1.0) == said(False, 1.0) == "the loader gave no more"


def test_what_a_stopped_run_says(tmp_path: Path) -> None:
    """Loaders need no data set, and data sets no length."""

    def said(*loaders: Any, processes: int = 1) -> str:
        trainer: Any = SimpleNamespace(predicting=False, test_dataloaders=list(loaders), world_size=processes)
        return stopped(trainer, 3, tmp_path / "scores.csv")

    rest = f" images: their verdicts are in {tmp_path}/scores.csv, the others were not judged."
    assert said(DataLoader([1] * 5), DataLoader([1] * 2)) == f"Stopped after 3 of 7{rest}"
    for unknown in ([1, 2], SimpleNamespace(dataset=iter([1]))):
        assert said(unknown) == f"Stopped after 3{rest}"
    assert said([1], processes=2) == (
        f"Stopped: each process's verdicts are in {tmp_path}, scores*.csv; other images were not judged."
    )
