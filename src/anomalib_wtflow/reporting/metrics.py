"""Metrics that the test images define, and no others."""

from typing import Any

import torch
from anomalib import metrics
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from anomalib_wtflow._registration import register_report

COMPARING = tuple(
    getattr(metrics, name) for name in ("AUROC", "AUPR", "AUPRO", "AUPIMO", "F1Score", "F1Max", "PGn", "PBn", "PIMO")
)
"""anomalib's metrics that compare good with defective: of one kind alone they give 0 or 1, as if measured."""
OF_GOOD_IMAGES = (metrics.AUPIMO, metrics.PIMO)
"""Those of pixels that take their false alarms from good images, not from good pixels of defective ones."""


@register_report
class DefinedMetrics(Callback):
    """Leave out of a test what needs good and defective images, or pixels, if the test images have only one of them.

    Each batch updates all metrics. Between batches, and so at the end, the evaluator holds those that the images up to
    then define.
    """

    def __init__(self) -> None:
        self._all: nn.ModuleList | None = None

    def on_test_start(self, _trainer: Trainer, pl_module: Any) -> None:
        """Keep all metrics, in the evaluator too: Lightning lists a module's metrics once, at the first test."""
        evaluator = getattr(pl_module, "evaluator", None)
        if evaluator is not None and hasattr(pl_module, "products"):
            self._all = evaluator.all_test_metrics = evaluator.test_metrics
            self._seen = {"gt_label": torch.zeros(2), "gt_mask": torch.zeros(2)}

    def on_test_batch_start(self, _trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Let the batch update all metrics."""
        if self._all is not None:
            pl_module.evaluator.test_metrics = self._all

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Keep the metrics that all images up to now define, in all processes alike."""
        if self._all is None:
            return
        for name, seen in self._seen.items():
            truth = getattr(outputs, name)
            if truth is not None:
                seen[truth.unique().long().cpu()] = 1
            seen = trainer.strategy.reduce(seen.to(pl_module.device), reduce_op="max")
            self._seen[name] = torch.as_tensor(seen).cpu()
        pl_module.evaluator.test_metrics = nn.ModuleList(each for each in self._all if is_defined(each, self._seen))

    def on_test_end(self, _trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Put them back, after a failure too."""
        if self._all is not None:
            pl_module.evaluator.test_metrics = self._all
            del pl_module.evaluator.all_test_metrics
        self._all = None

    on_exception = on_test_end  # type: ignore[assignment]  # the names differ


def is_defined(metric: Any, seen: dict[str, Tensor]) -> bool:
    """Whether images define a metric.

    Args:
        metric: One of anomalib's.
        seen: For ``gt_label`` and ``gt_mask``: 1 for each of 0 and 1 that occurs, ``(2,)``. Without labels nothing is
            left out.
    """
    if not isinstance(metric, COMPARING) or not seen["gt_label"].any():
        return True
    pixels = "gt_mask" in metric.fields
    return bool(seen["gt_mask" if pixels and not isinstance(metric, OF_GOOD_IMAGES) else "gt_label"].all())
