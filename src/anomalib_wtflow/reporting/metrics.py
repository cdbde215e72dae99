"""Only the metrics that the test images define."""

from typing import Any

import torch
from anomalib import metrics
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from anomalib_wtflow._registration import register_report

COMPARING = tuple(
    getattr(metrics, name) for name in ("AUROC", "AUPR", "AUPRO", "AUPIMO", "F1Score", "F1Max", "PGn", "PBn", "PIMO")
)
"""anomalib's metrics that compare good with defective: of one kind alone they give 0 or 1, as if measured."""
OF_GOOD_IMAGES = (metrics.AUPIMO, metrics.PIMO)
"""Those of pixels that take their false alarms from good images, not from good pixels of defective ones."""


@register_report
class DefinedMetrics(Callback):
    """Callback that hides metrics of good and defective images (pixels) if one kind is missing.

    Each batch updates all metrics. Between batches, and so at the end, the evaluator shows those that the images up to
    then define: a list in its ``vars`` hides its own, in which Lightning finds the names of metrics.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}

    def on_test_start(self, _trainer: Trainer, pl_module: Any) -> None:
        """Reset what was seen; ignore models of other classes."""
        ours = getattr(pl_module, "evaluator", None) is not None and hasattr(pl_module, "products")
        self._seen = {"gt_label": torch.zeros(2), "gt_mask": torch.zeros(2)} if ours else {}

    def on_test_batch_start(self, _trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Let the batch update all metrics."""
        if self._seen:
            vars(pl_module.evaluator).pop("test_metrics", None)

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Show the metrics that all images so far define, in all processes."""
        for name, seen in self._seen.items():
            truth = getattr(outputs, name)
            if truth is not None:
                seen[truth.unique().long().cpu()] = 1
            seen = trainer.strategy.reduce(seen.to(pl_module.device), reduce_op="max")
            self._seen[name] = torch.as_tensor(seen).cpu()
        if self._seen:
            evaluator = pl_module.evaluator
            vars(evaluator)["test_metrics"] = [each for each in evaluator.test_metrics if is_defined(each, self._seen)]

    def on_test_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Show all of them again, after a failure too."""
        self.on_test_batch_start(trainer, pl_module)

    on_exception = on_test_end  # type: ignore[assignment]  # the names differ


def is_defined(metric: Any, seen: dict[str, Tensor]) -> bool:
    """Return whether images define a metric.

    Args:
        metric: One of anomalib's.
        seen: For ``gt_label`` and ``gt_mask``: 1 for each of 0 and 1 that occurs, ``(2,)``. Without labels nothing is
            left out.
    """
    if not isinstance(metric, COMPARING) or not seen["gt_label"].any():
        return True
    pixels = "gt_mask" in metric.fields
    return bool(seen["gt_mask" if pixels and not isinstance(metric, OF_GOOD_IMAGES) else "gt_label"].all())
