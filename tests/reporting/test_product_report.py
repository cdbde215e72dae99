"""The report of products, against scikit-learn, in one process and in two."""

import json
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_wtflow.products.recognition import UNKNOWN, Recognition
from anomalib_wtflow.products.report import ProductReport, report_of

PRODUCTS = ["bolt", "nut", "pin"]


def drawn() -> SimpleNamespace:
    """Verdicts on 40 images of two products, and on 4 good ones of a third, of which two are of none."""
    torch.manual_seed(0)
    index = torch.cat([torch.arange(40) % 2, torch.full((4,), 2)])
    label = (torch.rand(44) < 0.5) & (index < 2)
    mask = (torch.rand(44, 8, 8) < 0.3) & label[:, None, None]
    score = (torch.rand(44) + 0.3 * label) / 2
    return SimpleNamespace(
        product=[PRODUCTS[k] for k in index],
        recognition=Recognition(index, torch.tensor([0.5] * 42 + [2.0] * 2)),
        gt_label=label,
        gt_mask=mask,
        pred_score=score,
        pred_label=score > 0.4,
        anomaly_map=((torch.rand(44, 8, 8) + 0.3 * mask) / 2)[:, None],
    )


def process(rank: int, processes: int, root: Path) -> None:
    """Report a share of the images; the third product comes to the first process alone."""
    if processes > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    whole, share = drawn(), [k for k in range(44) if (0 if k >= 40 else (k // 2) % processes) == rank]
    batch = {name: value[share] for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
    recognition = Recognition(*(values[share] for values in whole.recognition))
    outputs = SimpleNamespace(product=[whole.product[k] for k in share], recognition=recognition, **batch)
    model = SimpleNamespace(products=PRODUCTS, device="cpu", log=lambda *_, **__: None)
    trainer = SimpleNamespace(world_size=processes, is_global_zero=rank == 0, default_root_dir=root)
    report = ProductReport()
    report.on_test_start(trainer, model)
    report.on_test_batch_end(trainer, model, outputs)  # type: ignore[arg-type]
    report.on_test_epoch_end(trainer, model)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_metrics_of_each_product(tmp_path: Path, processes: int) -> None:
    if processes == 1:
        process(0, 1, tmp_path)
    else:
        workers = [get_context("spawn").Process(target=process, args=(rank, 2, tmp_path)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0]
    report, batch = json.loads((tmp_path / "products.json").read_text()), drawn()
    for k, name in enumerate(PRODUCTS[:2]):
        own = batch.recognition.index == k
        label, called, score = batch.gt_label[own], batch.pred_label[own], batch.pred_score[own]
        pixels = roc_auc_score(batch.gt_mask[own].flatten(), batch.anomaly_map[own].flatten())
        assert report["products"][name] == {
            "good": int((~label).sum()),
            "anomalous": int(label.sum()),
            "recognised": 1.0,
            "image_AUROC": pytest.approx(roc_auc_score(label, score)),
            "image_F1Score": pytest.approx(f1_score(label, called)),
            "misses": int((label & ~called).sum()),
            "false_alarms": int((~label & called).sum()),
            "pixel_AUROC": pytest.approx(pixels, abs=2e-3),
        }
    assert report["confusion"] == {"bolt": {"bolt": 20}, "nut": {"nut": 20}, "pin": {"pin": 2, UNKNOWN: 2}}
    assert "pixel_AUROC" not in report["products"]["pin"]
    for metric in ("image_AUROC", "pixel_AUROC"):
        first, second = (report["products"][name][metric] for name in PRODUCTS[:2])
        assert report["mean"][metric] == pytest.approx((first + second) / 2)
    assert report["mean"]["recognised"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_what_good_images_do_not_define_is_left_out() -> None:
    report = report_of([("bolt", "bolt", 0, 0.2, False), ("bolt", "nut", 0, 0.7, True)])
    metrics = {"good": 2, "anomalous": 0, "recognised": 0.5, "false_alarms": 1}
    assert report == {
        "products": {"bolt": metrics}, "mean": {"recognised": 0.5}, "confusion": {"bolt": {"bolt": 1, "nut": 1}}
    }  # fmt: skip
