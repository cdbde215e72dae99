"""What a test says of each product: metrics, and which product was taken for which."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from torchmetrics.functional.classification import binary_auroc, binary_f1_score

from anomalib_wtflow.writing import one_sentence_for

FILE = "products.json"
THRESHOLDS = 2000
"""Steps of the normalised scores in [0, 1] at which the pixel AUROC of a product is taken."""
COLUMNS = {
    "good": "good",
    "anomalous": "bad",
    "recognised": "recognised",
    "image_AUROC": "AUROC",
    "image_F1Score": "F1",
    "false_alarms": "false alarms",
    "misses": "misses",
    "pixel_AUROC": "pixel AUROC",
}
MEAN = "mean"


class ProductReport(Callback):
    """Print and save the metrics of each product, their mean, and the confusion of true and recognised products.

    Only for models of several products, and data that say which product each image is of. F1, false alarms and misses
    are at the model's own thresholds; ``recognised`` is the share of good images (of all, where none is good) whose
    product was told rightly. The file is ``products.json`` in the run's folder.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, float, bool]] = []
        self.pixels: defaultdict[str, BinaryAUROC] = defaultdict(lambda: BinaryAUROC(thresholds=THRESHOLDS))

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start anew."""
        del trainer, pl_module
        self.rows.clear()
        self.pixels.clear()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Take the verdicts of a batch."""
        del trainer, args, kwargs
        true = getattr(outputs, "product", None)
        if len(pl_module.product_names) == 1 or true is None or outputs.gt_label is None or outputs.pred_label is None:
            return
        recognised = pl_module.recognised(outputs.recognition)
        columns = (outputs.gt_label.int(), outputs.pred_score, outputs.pred_label.bool())
        self.rows += zip(true, recognised, *(column.tolist() for column in columns), strict=True)
        if outputs.gt_mask is not None and outputs.anomaly_map is not None:
            for name in set(true):
                which = torch.tensor([each == name for each in true])
                values, masks = (pixels.cpu()[which].flatten() for pixels in (outputs.anomaly_map, outputs.gt_mask))
                self.pixels[name].update(values.float(), masks.int())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print, log and save the report."""
        parts: list[Any] = [(self.rows, set(self.pixels))]
        if trainer.world_size > 1:
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, (self.rows, set(self.pixels)))
        rows = [row for part, _ in parts for row in part]
        # All processes compute all metrics, in one order, since they wait for each other in each.
        pixels = {name: self.pixels[name].compute() for name in sorted(set().union(*(names for _, names in parts)))}
        if not rows or not trainer.is_global_zero:
            return
        report = report_of(rows, pixels)
        for name, value in report["mean"].items():
            # Of all processes already: with rank_zero_only nothing is reduced; sync_dist ends Lightning's advice.
            pl_module.log(f"products_{name}", value, rank_zero_only=True, sync_dist=True)
        path = Path(trainer.default_root_dir) / FILE
        with one_sentence_for("The report of products", path, "make room there, or give another --default_root_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        for table in tables(report):
            Console().print(table)


def report_of(rows: list[tuple[str, str, int, float, bool]], pixels: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Make the report.

    Args:
        rows: True product, recognised product, true label, score and label of each image.
        pixels: Pixel AUROC of products that have masks.

    Returns:
        ``products`` (metrics by product; those that cannot be told are left out), ``mean`` (over the products that have
        them), and ``confusion`` (how many images of each true product were recognised as which).
    """
    products: dict[str, dict[str, float]] = {}
    confusion: dict[str, Counter[str]] = defaultdict(Counter)
    for name in sorted({row[0] for row in rows}):
        own = [row for row in rows if row[0] == name]
        confusion[name].update(row[1] for row in own)
        truth, score, called = (torch.tensor(column) for column in list(zip(*own, strict=True))[2:])
        good, bad = truth == 0, truth == 1
        metrics: dict[str, float] = {"good": int(good.sum()), "anomalous": int(bad.sum())}
        told = [row[1] == name for row in own if not row[2]] or [row[1] == name for row in own]
        metrics["recognised"] = sum(told) / len(told)
        if good.any() and bad.any():
            metrics["image_AUROC"] = float(binary_auroc(score, truth))
        if bad.any():
            metrics["image_F1Score"] = float(binary_f1_score(called.int(), truth))
            metrics["misses"] = int((bad & ~called).sum())
        if good.any():
            metrics["false_alarms"] = int((good & called).sum())
        if pixels and name in pixels:
            metrics["pixel_AUROC"] = float(pixels[name])
        products[name] = metrics
    names = ("recognised", "image_AUROC", "image_F1Score", "pixel_AUROC")
    values = {name: [metrics[name] for metrics in products.values() if name in metrics] for name in names}
    mean = {name: sum(each) / len(each) for name, each in values.items() if each}
    return {"products": products, "mean": mean, "confusion": {name: dict(each) for name, each in confusion.items()}}


def tables(report: dict[str, Any]) -> list[Table]:
    """Lay the report out for a terminal; the confusion only if there is any."""
    table = Table(title="Products", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("product", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, metrics in [*report["products"].items(), (MEAN, report["mean"])]:
        table.add_row(name, *(text_of(metrics.get(column)) for column in COLUMNS), end_section=name == MEAN)
    wrong = {
        (true, other): count
        for true, others in report["confusion"].items()
        for other, count in others.items()
        if other != true
    }
    if not wrong:
        return [table]
    confusion = Table("true product", "recognised as", "images", title="Products taken for another", box=SIMPLE_HEAD)
    for (true, other), count in sorted(wrong.items(), key=lambda item: -item[1]):
        confusion.add_row(true, other, str(count))
    return [table, confusion]


def text_of(value: float | None) -> str:
    """Write a number of the table; nothing for one that is not known."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
