"""What a checkpoint records about its model, and which checkpoints a model accepts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.settings import Settings, declared, option

KEY = "wtflow"
"""Entry of a checkpoint with the version, the settings, the products and the marks of images."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint as anomalib does: tensors and plain values only, no code is run.

    Raises:
        WTFlowError: If it is not a WTFlow model's, or :func:`raise_for_content` refuses it.
    """
    with anomalib_safe_globals():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    raise_for_content(checkpoint)
    return checkpoint


def raise_for_content(checkpoint: Any) -> None:
    """Refuse a checkpoint that no model of this version can use.

    Raises:
        WTFlowError: If another model or another version wrote it, or a value in it is NaN or infinite.
    """
    record = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict):
        msg = "The checkpoint is not one of this version of WTFlow: give its model.ckpt, or train the model again."
        raise WTFlowError(msg)
    needed = {name for name, each in declared().items() if each.metadata["scores"]}
    if not needed <= set(record["settings"]) <= set(declared()):
        version = record.get("version", "unknown")
        msg = f"Version {version} of anomalib-wtflow wrote the checkpoint, with other settings: train the model again."
        raise WTFlowError(msg)
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    broken = [*broken_tensors(state, "model.")]
    rate, name = record["settings"]["false_alarm_rate"], "post_processor.effective_false_alarm_rate"
    if rate is not None and name in state:
        limits = [name, "post_processor._image_threshold", "post_processor._pixel_threshold"]
        broken += [each for each in limits if not state[each].isfinite().all()]
    if broken:
        msg = f"'{broken[0]}' in the checkpoint is NaN or infinite: give another checkpoint, or train the model again."
        raise WTFlowError(msg)


def broken_tensors(state: Mapping[str, Tensor], prefix: str = "") -> Iterator[str]:
    """Yield the names, behind ``prefix``, of weights and statistics that are NaN or infinite.

    The limit of the background level may be infinite, and the recogniser's where there is one product.
    """
    limits = {f"{prefix}anomaly_map_generator.limit"}
    if len(state.get(f"{prefix}class_embeddings", ())) <= 1:
        limits.add(f"{prefix}recognizer.limit")
    for name, tensor in state.items():
        if name.startswith(prefix):
            sound = tensor > -torch.inf if name in limits else tensor.isfinite()
            if not sound.all():
                yield name


def raise_for_settings(checkpoint: Mapping[str, Any], settings: Settings) -> None:
    """Refuse weights trained with other settings: they would change the scores.

    Args:
        checkpoint: The checkpoint.
        settings: Of the model that is to take its weights.

    Raises:
        WTFlowError: If it was trained with other settings.
    """
    theirs, ours = checkpoint[KEY]["settings"], settings.plain()
    names = [name for name, each in declared().items() if each.metadata["scores"]]
    differing = [name for name in names if _sides(theirs[name]) != _sides(ours[name])]
    if differing:
        text = ", ".join(f"{name}={theirs[name]!r} (here {ours[name]!r})" for name in differing)
        msg = f"The checkpoint was trained with {text}: give the model the same, as {option(differing[0])}."
        raise WTFlowError(msg)
    asked, trained = ours["false_alarm_rate"], theirs["false_alarm_rate"]
    if asked not in (trained, Settings.false_alarm_rate):
        rank_zero_warn(
            f"The checkpoint's threshold is for false_alarm_rate={trained}. {asked} is ignored here: "
            "change the threshold with `anomalib-wtflow calibrate`."
        )


def _sides(value: Any) -> Any:
    """Return height and width for one side: an image size of 64 is [64, 64]."""
    return [value, value] if isinstance(value, int) else value
