"""What callbacks share that take something out of the data module for the time of a fit."""

from lightning.pytorch import Callback, LightningModule, Trainer


class GivesBack(Callback):
    """Put the data module in order when a fit ends, well or not: other models may use it after this one."""

    def give_back(self, trainer: Trainer) -> None:
        """Put it in order; there may be nothing to do."""
        raise NotImplementedError

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put it in order at the end of a fit."""
        del pl_module
        if stage == "fit":
            self.give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put it in order after a failure."""
        del pl_module, exception
        self.give_back(trainer)
