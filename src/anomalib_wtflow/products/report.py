"""Test report by product: metrics, and the confusion of products."""

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

from anomalib_wtflow._registration import register_report

THRESHOLDS = 2000
"""Steps of the normalised scores in [0, 1] at which the pixel AUROC of a product is taken."""
MEANS = ("recognised", "image_AUROC", "image_F1Score", "pixel_AUROC")


@register_report
class ProductReport(Callback):
    """Metrics of each product, their mean, and the confusion of products, as text and file.

    Only for models of several products, and data that know which product each image is of. F1, false alarms and misses
    are at the model's own thresholds; ``recognised`` is the share of good images (of all, where none is good) whose
    product was recognised rightly. The file is ``products.json`` in the run's folder.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, float, bool]] = []
        self.pixels: defaultdict[str, BinaryAUROC] = defaultdict(lambda: BinaryAUROC(thresholds=THRESHOLDS))

    def on_test_start(self, *_: Any) -> None:
        """Clear the results of an earlier test."""
        self.rows.clear()
        self.pixels.clear()

    def on_test_batch_end(self, _trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Take the verdicts of a batch."""
        true = getattr(outputs, "product", None)
        several = len(getattr(pl_module, "products", ())) > 1
        if not several or true is None or outputs.gt_label is None or outputs.pred_label is None:
            return
        recognised = outputs.recognition.names(pl_module.products)
        columns = (outputs.gt_label.int(), outputs.pred_score, outputs.pred_label.bool())
        self.rows += zip(true, recognised, *(column.tolist() for column in columns), strict=True)
        if outputs.gt_mask is not None and outputs.anomaly_map is not None:
            for name in set(true):
                which = torch.tensor([each == name for each in true])
                values, masks = (pixels.cpu()[which].flatten() for pixels in (outputs.anomaly_map, outputs.gt_mask))
                self.pixels[name].update(values.float(), masks.int())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print, log and save the report."""
        parts: list[Any] = [(self.rows, set(self.pixels))] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, parts[0])
        rows = [row for part, _ in parts for row in part]
        # All processes compute all metrics, in one order, since they wait for each other in each.
        pixels = {
            name: self.pixels[name].to(pl_module.device).compute()
            for name in sorted(set().union(*(names for _, names in parts)))
        }
        if not rows or not trainer.is_global_zero:
            return
        report = report_of(rows, pixels)
        for name, value in report["mean"].items():
            # Of all processes already: with rank_zero_only nothing is reduced; sync_dist ends Lightning's advice.
            pl_module.log(f"products_{name}", value, rank_zero_only=True, sync_dist=True)
        path = Path(trainer.default_root_dir) / "products.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print_report(report)


def report_of(rows: list[tuple[str, str, int, float, bool]], pixels: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Make the report.

    Args:
        rows: True product, recognised product, true label, score and label of each image.
        pixels: Pixel AUROC of products that have masks.

    Returns:
        ``products`` (metrics by product; those that are not defined are left out), ``mean`` (over the products that
        have them), and ``confusion`` (how many images of each true product were recognised as which).
    """
    products: dict[str, dict[str, float]] = {}
    confusion: dict[str, Counter[str]] = {}
    for name in sorted({row[0] for row in rows}):
        own = [row for row in rows if row[0] == name]
        confusion[name] = Counter(row[1] for row in own)
        products[name] = product_metrics(own)
        if pixels and name in pixels and products[name]["anomalous"]:
            products[name]["pixel_AUROC"] = float(pixels[name])
    values = {name: [metrics[name] for metrics in products.values() if name in metrics] for name in MEANS}
    mean = {name: sum(each) / len(each) for name, each in values.items() if each}
    return {"products": products, "mean": mean, "confusion": {name: dict(each) for name, each in confusion.items()}}


def product_metrics(rows: list[tuple[str, str, int, float, bool]]) -> dict[str, float]:
    """Compute the metrics of a product's images; those that are not defined are left out."""
    truth, score, called = (torch.tensor(column) for column in list(zip(*rows, strict=True))[2:])
    good, bad = truth == 0, truth == 1
    right = [true == recognised for true, recognised, label, *_ in rows if not (label and good.any())]
    metrics: dict[str, float] = {"good": int(good.sum()), "anomalous": int(bad.sum())}
    metrics["recognised"] = sum(right) / len(right)
    if good.any() and bad.any():
        metrics["image_AUROC"] = float(binary_auroc(score, truth))
    if bad.any():
        metrics["image_F1Score"] = float(binary_f1_score(called.int(), truth))
        metrics["misses"] = int((bad & ~called).sum())
    if good.any():
        metrics["false_alarms"] = int((good & called).sum())
    return metrics


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table, and below it which products were taken for another."""
    console = Console(markup=False)
    table = Table("product", title="Products", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("good", "anomalous", "false_alarms", "misses", *MEANS)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, metrics in [*report["products"].items(), ("mean", report["mean"])]:
        values = [metrics.get(column, "") for column in columns]
        table.add_row(name, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
    for true, others in report["confusion"].items():
        for other, count in others.items():
            if other != true:
                console.print(f"{count} images of '{true}' were taken for '{other}'.")
