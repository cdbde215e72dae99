"""Check that batches are large enough for the coupling."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from anomalib_wtflow.flow.coupling import BATCH_COUPLINGS


class BatchCheck(Callback):
    """Refuse batches of one image where the coupling rearranges noise between the images of a batch."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at the training loader.

        Raises:
            ValueError: If the coupling needs several images a batch, and there is one.
        """
        coupling = pl_module.settings.coupling
        loader: Any = trainer.train_dataloader
        images_a_batch = min(getattr(loader, "batch_size", None) or 2, len(loader.dataset))
        if coupling in BATCH_COUPLINGS and images_a_batch == 1:
            single = len(loader.dataset) == 1
            why = "there is one, beside those for the threshold" if single else "the batch size is 1"
            way = "give more normal images" if single else "raise --data.train_batch_size"
            msg = (
                f"coupling '{coupling}' rearranges noise between the images of a batch, and {why}: {way}, or choose "
                "worst_of_two, antipodal or independent."
            )
            raise ValueError(msg)
