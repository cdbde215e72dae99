"""The table of verdicts, against anomalib's own predictions."""

import json
from copy import copy
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from torch.utils.data import DataLoader

from anomalib_wtflow import WTFlow, WTFlowPostProcessor
from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.products.recognition import UNKNOWN, Recognition
from anomalib_wtflow.reporting.summary import highest, read_rows, sentences
from anomalib_wtflow.reporting.verdicts import VERDICT_COLUMNS, Verdicts, rows_of
from conftest import quiet_engine


@pytest.mark.slow
def test_rows_are_anomalibs_predictions(tmp_path: Path, trained: SimpleNamespace) -> None:
    model = WTFlow.load_from_checkpoint(trained.checkpoint).eval()
    batches: Any = quiet_engine(tmp_path).predict(model, dataset=PredictDataset(trained.parts.root / "test"))
    rows = list(read_rows(next(tmp_path.rglob("scores.csv"))))
    assert [row["image_path"] for row in rows] == [path for batch in batches for path in batch.image_path]
    assert len(rows) == 32
    scores = torch.cat([batch.pred_score for batch in batches]).flatten()
    torch.testing.assert_close(torch.tensor([row["pred_score"] for row in rows]), scores, rtol=0, atol=0)
    labels = torch.cat([batch.pred_label for batch in batches]).flatten().tolist()
    assert [row["pred_label"] for row in rows] == ["anomalous" if label else "good" for label in labels]
    assert len(set(labels)) == 2
    maps, masks = (torch.cat([getattr(b, name) for b in batches]).flatten(1) for name in ("anomaly_map", "pred_mask"))
    torch.testing.assert_close(torch.tensor([row["largest_pixel"] for row in rows]), maps.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(torch.tensor([row["outlined"] for row in rows]), masks.float().mean(1))
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
    rows, whole = list(read_rows(path)), json.loads(path.with_suffix(".json").read_text())
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
def test_metrics_that_good_images_do_not_define_are_left_out(
    tmp_path: Path, trained: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this test only: afterwards the same model is tested with all."""
    model, engine, data = WTFlow.load_from_checkpoint(trained.checkpoint).eval(), quiet_engine(tmp_path), trained.parts
    data.prepare_data()
    data.setup()
    samples, found = data.test_data.samples, []
    for labels in ([0], [1], [0, 1], [0]):
        images = copy(data.test_data)
        images.samples = samples[samples["label_index"].isin(labels)].reset_index(drop=True)
        loader = DataLoader(images, 4, collate_fn=images.collate_fn)
        found.append(set(engine.test(model, dataloaders=loader, verbose=False)[0]))
    names = {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    assert found == [set(), {"pixel_AUROC", "pixel_F1Score"}, names, set()]
    assert len(model.evaluator.test_metrics) == 4
    out = capsys.readouterr().out
    assert "There are no defective images, so AUROC and F1 cannot be measured" in out
    assert "There are no good images, so AUROC, F1 and false alarms cannot be measured" in out
    promised = float(trained.model.post_processor.effective_false_alarm_rate)
    assert f"called anomalous, at most {promised:.1%} promised." in out


# Without a model -----------------------------------------------------------------------------------------------------


def several() -> tuple[Any, ImageBatch]:
    """Three images of a model of two products, the last one of neither."""
    post = WTFlowPostProcessor(0.5)
    post.calibrate(Scores(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0]), torch.tensor([0, 1])), 2)
    raw = torch.tensor([3.0, 3.0, 0.5])
    batch = ImageBatch(
        image=torch.zeros(3, 3, 2, 2),
        pred_score=raw.clone(),
        anomaly_map=torch.tensor([0.5, 0.5, 2.0])[:, None, None, None].expand(3, 1, 2, 2).contiguous(),
        image_path=["a.png", "ü,b.png", "c\udcff.png"],
        gt_label=torch.tensor([False, True, True]),
    )
    batch.recognition = Recognition(torch.tensor([0, 1, 0]), torch.tensor([0.1, 0.1, 4.0]))
    batch.raw_score = raw
    post.post_process_batch(batch)
    return SimpleNamespace(post_processor=post, products=["bolt", "nut"]), batch


def trainer_of(root: Path, rank: int = 0, processes: int = 1) -> Any:
    return SimpleNamespace(default_root_dir=root, global_rank=rank, world_size=processes, is_global_zero=rank == 0)


def test_each_image_has_the_threshold_of_its_product() -> None:
    rows = rows_of(*several())
    assert tuple(rows[0]) == VERDICT_COLUMNS
    assert [row["product"] for row in rows] == ["bolt", "nut", UNKNOWN]
    assert [row["threshold"] for row in rows] == [1.0, 4.0, 1.0]
    assert [row["pred_label"] for row in rows] == ["anomalous", "good", "anomalous"]
    assert [row["raw_score"] for row in rows] == [3.0, 3.0, 0.5]
    expected = [3 / 4, 3 / 7, 4 / 5]  # the last by its distance: 4 thresholds
    assert [row["pred_score"] for row in rows] == pytest.approx(expected, rel=1e-7)
    assert [row["largest_pixel"] for row in rows] == pytest.approx([1 / 3, 1 / 3, 2 / 3], rel=1e-7)
    assert [row["outlined"] for row in rows] == [0.0, 0.0, 1.0]


def test_files_hold_any_name_and_the_summary_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the last run alone, in a folder of an earlier one."""
    model, batch = several()
    path, trainer = tmp_path / "run" / "scores.csv", trainer_of(tmp_path / "run")
    for _ in range(2):
        report = Verdicts()
        report.on_predict_start(trainer, model)
        report.on_predict_batch_end(trainer, model, batch, None, 0)
        assert len(list(read_rows(path))) == 3  # before the end
        assert not path.with_suffix(".json").exists()
        report.on_predict_end(trainer, model)
    assert [row["image_path"] for row in read_rows(path)] == ["a.png", "ü,b.png", "c\\udcff.png"]
    whole = json.loads(path.with_suffix(".json").read_text())
    assert whole["images"] == list(read_rows(path))
    assert whole["summary"] == {
        "images": 3,
        "good": 1,
        "anomalous": 2,
        "unknown": 1,
        "false_alarms": 1,
        "misses": 1,
        "truly_good": 1,
        "truly_anomalous": 2,
        "scores": pytest.approx([3 / 7, 3 / 4, 4 / 5]),
        "promises": {"bolt": 0.5, "nut": 0.5},
        "limit": 0.5,
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert lines[:8] == [
        "3 images: 1 good, 2 anomalous (1 of them like no product).",
        "Scores from 0.429 to 0.800, median 0.750; above 0.5 is anomalous.",
        "Of 1 good ones 1 called anomalous, at most 50.0% promised.",
        "Of 2 defective ones 1 called good.",
        "Highest scores (pred_score, pred_label, gt_label, product, image_path):",
        f"0.8000  anomalous  anomalous  {UNKNOWN}  c\\udcff.png",
        "0.7500  anomalous  good  bolt  a.png",
        "0.4286  good  anomalous  nut  ü,b.png",
    ]


def test_the_highest_scores_of_many(tmp_path: Path) -> None:
    order = torch.randperm(500).tolist()
    lines = [f"{k}.png,,{k},{k / 500},250,{'good' if k < 250 else 'anomalous'},,0,0" for k in order]
    (tmp_path / "scores.csv").write_text("\n".join([",".join(VERDICT_COLUMNS), *lines]) + "\n")
    shown = [line.split()[-1] for line in highest(tmp_path / "scores.csv")[1:]]
    assert shown == [f"{k}.png" for k in range(499, 489, -1)]


def test_a_model_without_thresholds_gives_no_verdicts() -> None:
    summary = {"images": 3, "good": 0, "anomalous": 0}
    assert sentences(summary) == ["3 images without verdicts: the model has no threshold."]


def test_another_model_is_left_alone(tmp_path: Path) -> None:
    report, trainer, model = Verdicts(), trainer_of(tmp_path), SimpleNamespace()
    report.on_test_start(trainer, model)
    report.on_test_batch_end(trainer, model, None, None, 0)
    report.on_test_end(trainer, model)
    assert not list(tmp_path.iterdir())


def process(rank: int, root: Path) -> None:
    """One of two, which judges an image more than the other, and one that the other judges too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    model, batch = several()
    report, trainer = Verdicts(), trainer_of(root, rank, 2)
    report.on_test_start(trainer, model)
    for names in (["a", "b", "c"], ["d", "e", "f"])[: 2 - rank]:
        batch.image_path = names if rank == 0 else ["x", "y", "a"]
        report.on_test_batch_end(trainer, model, batch, None, 0)
    report.on_test_end(trainer, model)


@pytest.mark.slow
def test_the_first_of_two_processes_writes_all_rows_once(tmp_path: Path) -> None:
    workers = [get_context("spawn").Process(target=process, args=(rank, tmp_path)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.name for path in sorted(tmp_path.glob("scores*"))] == ["scores.csv", "scores.json"]
    assert [row["image_path"] for row in read_rows(tmp_path / "scores.csv")] == list("abcdefxy")
    assert json.loads((tmp_path / "scores.json").read_text())["summary"]["images"] == 8
