"""Metrics that the test images can tell, and no others."""

from typing import Any

from anomalib import metrics
from lightning.pytorch import Callback, Trainer
from torch import nn

BOTH_LABELS = tuple(
    getattr(metrics, name) for name in ("AUROC", "AUPR", "AUPRO", "AUPIMO", "F1Score", "F1Max", "PGn", "PBn", "PIMO")
)
"""anomalib's metrics that compare good with defective images; of one kind alone they give 0 or 1, as if measured."""


class MeasurableMetrics(Callback):
    """Leave out of a test what needs good and defective images, if the test set has only one of them."""

    def __init__(self) -> None:
        self._all: nn.ModuleList | None = None

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the metrics out that cannot be measured."""
        samples = getattr(getattr(getattr(trainer, "datamodule", None), "test_data", None), "samples", None)
        if samples is None or samples["label_index"].nunique() > 1 or pl_module.evaluator is None:
            return
        self._all = pl_module.evaluator.test_metrics
        pl_module.evaluator.test_metrics = nn.ModuleList(
            metric for metric in pl_module.evaluator.test_metrics if not isinstance(metric, BOTH_LABELS)
        )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Put them back after a failure, too."""
        del exception
        self.teardown(trainer, pl_module, "test")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Put them back."""
        del trainer, stage
        if self._all is not None:
            pl_module.evaluator.test_metrics = self._all
        self._all = None
