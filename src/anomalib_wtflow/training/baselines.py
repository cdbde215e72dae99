"""anomalib's Fastflow for ``anomalib benchmark``, which cannot pass it a number of epochs."""

from anomalib.models import Fastflow

from anomalib_wtflow.training.epoch_default import EpochDefault


class FastflowBaseline(EpochDefault, Fastflow):  # type: ignore[misc]
    """anomalib's Fastflow, unchanged, with WTFlow's default of 20 epochs in place of Lightning's 1000."""

    max_epochs = 20
