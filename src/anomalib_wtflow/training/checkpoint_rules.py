"""Which checkpoints a model takes."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from anomalib_wtflow.settings import Settings, declared, option

KEY = "wtflow"
"""Where a checkpoint says what WTFlow needs to know of it."""
RESUME = ("false_alarm_rate", "calibration_ratio")
"""Settings that choose which images the field is not trained on, and so must not change when a training goes on."""


def describe(settings: Settings, version: str) -> dict[str, Any]:
    """Return what a checkpoint says of its model: the version of this package, and all settings."""
    return {"version": version, "settings": settings.plain()}


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
    if not resuming and asked != trained:
        rank_zero_warn(
            f"The checkpoint's threshold is for false_alarm_rate={trained}; {asked}, given here, changes nothing: "
            "train again for another rate."
        )
