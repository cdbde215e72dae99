"""What callbacks share that take or replace something for the time of a run."""

from collections.abc import Callable
from typing import Any

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


def stand_in(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Put another function in the place of an object's method.

    Args:
        owner: The object; its class stays as it is.
        name: Of the method.
        make: Makes the function from the method that it stands in for.

    Returns:
        What gives the method back, once or several times.
    """
    before = dict(vars(owner))
    setattr(owner, name, make(getattr(owner, name)))

    def give_back() -> None:
        if name in before:
            setattr(owner, name, before[name])
        else:
            vars(owner).pop(name, None)

    return give_back
