"""What a model writes into its checkpoint, and what it takes from one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anomalib.post_processing import PostProcessor
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from anomalib_wtflow import __version__
from anomalib_wtflow.callers import call_of
from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.settings import Settings
from anomalib_wtflow.training import checkpoint_rules
from anomalib_wtflow.training.checkpoint_reading import is_local


def at_the_end_of_a_training() -> bool:
    """Whether anomalib's ``Engine.train``, which tests after training, is being called."""
    from anomalib.engine import Engine  # which imports the models first

    return call_of(Engine.train) is not None


class Checkpoints:
    """Mixin: a checkpoint says what it is of, holds each threshold once, and refuses other models."""

    settings: Settings
    model: Any
    pre_processor: nn.Module | None
    post_processor: nn.Module | None
    product_names: Sequence[str]
    trained_steps: int = 0
    """Training steps and epochs of the checkpoint that was loaded, if one was."""
    trained_epochs: int = 0
    trained_on: Tensor | None = None
    """Its training images, if it says so."""
    _trainer: Any
    trainer: Any

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint. The backbone's weights come from it, so neither a hub nor another file is needed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint that this version can use.
        """
        path = kwargs.get("checkpoint_path", args[0] if args else None)
        if is_local(path):
            with anomalib_safe_globals(cls.checkpoint_safe_globals()):  # type: ignore[attr-defined]
                checkpoint_rules.read(path)
        files = {"pre_trained": False, "weights": None, "start_from": None}
        return super().load_from_checkpoint(*args, **{**files, **kwargs})  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint which settings and which version it is of."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        self._forget_copy(checkpoint)
        checkpoint[checkpoint_rules.KEY] = checkpoint_rules.describe(
            self._settings_in_force, __version__, self.product_names, self.trained_on
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; take over which post-processor it was trained with.

        Raises:
            ValueError: If another version or another model wrote it, it is broken, its settings are others, or it was
                trained with a pre-processor and the model has none.
        """
        fn = None if self._trainer is None else self.trainer.state.fn
        if fn == TrainerFn.TESTING and at_the_end_of_a_training():
            # anomalib 2.7 tests with the checkpoint that a training went on from, not with what became of it.
            checkpoint.update(state_dict=self.state_dict(), callbacks={})  # type: ignore[attr-defined]
            rank_zero_info("The test is of the weights at the end of the training, not of those in the checkpoint.")
            return
        path = None if self._trainer is None else self.trainer.ckpt_path
        file = "The checkpoint" if path is None else f"'{path}'"
        checkpoint_rules.raise_for_content(checkpoint, file)  # again for what was not read from a file of this machine
        checkpoint_rules.raise_for_other(checkpoint, self._settings_in_force, fn == TrainerFn.FITTING, file)
        if self.pre_processor is None and checkpoint.get("anomalib_components_enabled", {}).get("pre_processor"):
            msg = f"{file} was trained with a pre-processor, and this model has none: leave out pre_processor=False."
            raise ValueError(msg)
        trained_with_ours = "post_processor.effective_false_alarm_rate" in checkpoint.get("state_dict", {})
        if isinstance(self.post_processor, WTFlowPostProcessor) and not trained_with_ours:
            self._replace_post_processor(PostProcessor())
        said = checkpoint[checkpoint_rules.KEY]
        self.product_names, images = said["products"], said.get("images")
        self.trained_on = images if isinstance(images, Tensor) and images.ndim == 1 else None
        self.trained_steps, self.trained_epochs = checkpoint.get("global_step", 0), checkpoint.get("epoch", 0) + 1
        self._forget_copy(checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        # Lightning loads them after this, and would end with torch's words.
        version = checkpoint[checkpoint_rules.KEY].get("version")
        strict = self.strict_loading  # type: ignore[attr-defined]
        checkpoint_rules.load_state(self, checkpoint["state_dict"], version, file, strict)  # type: ignore[arg-type]

    def _replace_post_processor(self, new: PostProcessor) -> None:
        """Put another post-processor in the place of the model's, which is a callback of the trainer's too."""
        if self._trainer is not None:
            self.trainer.callbacks[:] = [
                new if each is self.post_processor else each for each in self.trainer.callbacks
            ]
        self.post_processor = new

    def _forget_copy(self, checkpoint: dict[str, Any]) -> None:
        """Drop the thresholds' copy: a post-processor is a callback too, whose state Lightning writes and restores."""
        checkpoint.get("callbacks", {}).pop(getattr(self.post_processor, "state_key", None), None)

    @property
    def _settings_in_force(self) -> Settings:
        """The settings, with the false-alarm rate of a post-processor that the user built."""
        rate = getattr(self.post_processor, "false_alarm_rate", self.settings.false_alarm_rate)
        return replace(self.settings, false_alarm_rate=rate)
