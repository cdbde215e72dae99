"""anomalib's Fastflow for ``anomalib benchmark``, which cannot pass it a number of epochs."""

from typing import Any

from anomalib.models import Fastflow


class FastflowBaseline(Fastflow):
    """anomalib's Fastflow with 20 epochs in place of Lightning's 1000."""

    max_epochs = 20

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Fastflow's own, and the number of epochs."""
        return {**super().trainer_arguments, "max_epochs": self.max_epochs}
