"""Metrics that the test images can tell, and no others."""

from typing import Any

from anomalib import metrics
from anomalib.data.utils import LabelName
from lightning.pytorch import Callback, Trainer
from torch import nn

BOTH_LABELS = tuple(
    getattr(metrics, name) for name in ("AUROC", "AUPR", "AUPRO", "AUPIMO", "F1Score", "F1Max", "PGn", "PBn", "PIMO")
)
"""anomalib's metrics that compare good with defective images, or pixels; of one kind alone they give 0 or 1, as if
measured."""
GOOD_IMAGES = (metrics.AUPIMO, metrics.PIMO)
"""Those of pixels that take their false alarms from good images, not from the good pixels of defective ones."""


class MeasurableMetrics(Callback):
    """Leave out of a test what needs good and defective images, or pixels, if the test set has only one of them.

    Defective images with masks have pixels of both kinds.
    """

    def __init__(self) -> None:
        self._all: nn.ModuleList | None = None

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the metrics out that cannot be measured."""
        labels, masked = kinds_of(trainer.test_dataloaders)
        if len(labels) != 1 or pl_module.evaluator is None:
            return
        self._all = pl_module.evaluator.test_metrics
        pl_module.evaluator.test_metrics = nn.ModuleList(
            metric
            for metric in pl_module.evaluator.test_metrics
            if not isinstance(metric, BOTH_LABELS)
            or (masked and "gt_mask" in metric.fields and not isinstance(metric, GOOD_IMAGES))
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


def kinds_of(loaders: Any) -> tuple[set[int], bool]:
    """Return the labels in the data sets of loaders, and whether a defective image has a mask.

    The labels are an empty set where a data set does not tell them.
    """
    labels: set[int] = set()
    masked = False
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        samples = getattr(getattr(loader, "dataset", None), "samples", None)
        if samples is None:
            return set(), False
        labels |= set(samples["label_index"])
        masks = samples.get("mask_path", "")
        masked |= bool(((samples["label_index"] == LabelName.ABNORMAL) & (masks != "")).any())
    return labels, masked
