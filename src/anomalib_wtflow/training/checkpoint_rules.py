"""Which checkpoints a model takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from anomalib_wtflow.settings import Settings, declared, option

KEY = "wtflow"
"""Where a checkpoint says what WTFlow needs to know of it."""
RESUME = ("false_alarm_rate", "calibration_ratio")
"""Settings that choose which images the field is not trained on, and so must not change when a training goes on."""


def describe(settings: Settings, version: str, products: Sequence[str]) -> dict[str, Any]:
    """Return what a checkpoint says of its model: the version of this package, all settings, and the products."""
    return {"version": version, "settings": settings.plain(), "products": list(products)}


def read(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, without running any code that it may hold.

    Raises:
        ValueError: If there is no such file, or it is not a checkpoint.
    """
    if not Path(path).is_file():
        msg = f"There is no checkpoint at '{path}': give the model.ckpt that 'anomalib train --model WTFlow' wrote."
        raise ValueError(msg)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if {"state_dict", "epoch"} <= set(checkpoint):
            return checkpoint
    except Exception:  # nosec B110  # whatever it is, the sentence below says what to do
        pass
    msg = f"'{path}' is not a checkpoint of a WTFlow model: give the model.ckpt of its run."
    raise ValueError(msg)


def raise_for_other(checkpoint: dict[str, Any], settings: Settings, resuming: bool) -> None:
    """Refuse a checkpoint of another model: settings that fit can still change the scores under its threshold.

    Args:
        checkpoint: The checkpoint.
        settings: Of the model that is to take its weights; a false-alarm rate is that of its post-processor.
        resuming: Whether its training goes on.

    Raises:
        ValueError: If an earlier version or another model wrote it, or it was trained with other settings.
    """
    if KEY not in checkpoint:
        msg = (
            "The checkpoint holds no WTFlow model of this version, so an earlier version or another model wrote it: "
            "give the model.ckpt of a WTFlow run, or train the model again."
        )
        raise ValueError(msg)
    theirs, ours = checkpoint[KEY]["settings"], settings.plain()
    if "products" not in checkpoint[KEY]:
        msg = f"An earlier version ({checkpoint[KEY].get('version')}) wrote the checkpoint: train the model again."
        raise ValueError(msg)
    names = [name for name, each in declared().items() if each.metadata["scores"] or (resuming and name in RESUME)]
    for name in names:
        if name not in theirs:
            version = checkpoint[KEY].get("version")
            msg = f"The checkpoint has no {name}, so an earlier version ({version}) wrote it: train the model again."
            raise ValueError(msg)
    differing = [name for name in names if theirs[name] != ours[name]]
    if differing:
        text = ", ".join(f"{name}={theirs[name]!r} (here {ours[name]!r})" for name in differing)
        msg = f"The checkpoint was trained with {text}: give the model the same, as {option(differing[0])}."
        raise ValueError(msg)
    asked, trained = ours["false_alarm_rate"], theirs.get("false_alarm_rate")
    if not resuming and asked not in (trained, Settings.false_alarm_rate):
        rank_zero_warn(
            f"The checkpoint's threshold is for false_alarm_rate={trained}; {asked}, given here, changes nothing: "
            "set another with `anomalib-wtflow calibrate`."
        )
