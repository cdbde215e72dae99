"""Which checkpoints a model takes."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.utilities import rank_zero_warn
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from anomalib_wtflow.settings import Settings, declared, option
from anomalib_wtflow.torch_model import broken_tensors

KEY = "wtflow"
"""Where a checkpoint says what WTFlow needs to know of it."""
WRITTEN = {"state_dict", "epoch", "pytorch-lightning_version"}
"""What Lightning writes into each checkpoint, and needs in it."""
TYPES = {"epoch": int, "pytorch-lightning_version": str, "hyper_parameters": dict, "callbacks": dict}
"""Types of what is read before any value is used; callbacks may be left out."""
ADVICE = "Weights only load failed"
"""So begins the error with which torch advises to run what is in a file."""
POST = "post_processor."
RATE = "effective_false_alarm_rate"
SCORES, SHOWN = f"{POST}calibration_scores", f"{POST}calibration_product"
"""Where the scores are that thresholds come from, and their products, and (above) the rate that they support."""
RESUME = ("false_alarm_rate", "calibration_ratio")
"""Settings that choose which images the field is not trained on, and so must not change when a training goes on."""


def describe(settings: Settings, version: str, products: Sequence[str], images: Tensor | None) -> dict[str, Any]:
    """Return what a checkpoint says of its model: the version of this package, all settings, and the products.

    And, where they are known, its training images (:func:`anomalib_wtflow.training.same_data.marks_of`).
    """
    said = {"version": version, "settings": settings.plain(), "products": list(products)}
    return said if images is None else {**said, "images": images}


def load(path: str | Path) -> Any:
    """Load what ``torch.save`` wrote, tensors and plain values only, as anomalib does: no code in the file runs."""
    with anomalib_safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True)


def read(path: str | Path, load: Callable[[str | Path], Any] = load) -> dict[str, Any]:
    """Read a checkpoint of a WTFlow model, without running any code that it may hold.

    Args:
        path: The file.
        load: Reads it; must not run code either.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is what :func:`raise_for_content` refuses.
    """
    if not Path(path).is_file():
        msg = f"There is no checkpoint at '{path}': give the model.ckpt that 'anomalib train --model WTFlow' wrote."
        raise FileNotFoundError(msg)
    checkpoint: Any = None
    cause = None
    try:
        checkpoint = load(path)
    except Exception as error:
        if reason := _reason(error):
            msg = (
                f"'{path}' cannot be read ({reason}), which says nothing of what is in it: see to that, and run again."
            )
            raise ValueError(msg) from error
        if ADVICE not in str(error):
            cause = error
    whole = isinstance(checkpoint, dict) and WRITTEN.issubset(checkpoint)
    state = checkpoint["state_dict"] if whole else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        msg = (
            f"'{path}' is not a checkpoint of a WTFlow model: give the model.ckpt of its run, or train the model again "
            "if the file is damaged."
        )
        raise ValueError(msg) from cause
    raise_for_content(checkpoint, f"'{path}'")
    return checkpoint


def _reason(error: Exception) -> str:
    """Say why a file cannot be read, if that is not the file's fault."""
    if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)):  # torch's, too
        return "out of memory"
    return (error.strerror or str(error)) if isinstance(error, OSError) else ""


def raise_for_content(checkpoint: dict[str, Any], file: str = "The checkpoint") -> None:
    """Refuse what no model can use, whatever its settings.

    Args:
        checkpoint: The checkpoint.
        file: What the message calls it.

    Raises:
        ValueError: If another model, or another version of this package, wrote it; what it holds is of another type
            or shape; or a weight, a threshold or what else labels depend on is NaN or infinite.
    """
    state, said = checkpoint["state_dict"], checkpoint.get(KEY)
    said = said if isinstance(said, dict) else {}
    if not said and not any(name.startswith("model.field.") for name in state):
        msg = f"{file} holds another model than WTFlow: give the model.ckpt of a WTFlow run."
        raise ValueError(msg)
    theirs, ours = said.get("settings"), declared()
    theirs = theirs if isinstance(theirs, dict) else {}
    lacking = [name for name in ("settings", "products") if name not in said]
    lacking += [
        name for name, each in ours.items() if (each.metadata["scores"] or name in RESUME) and name not in theirs
    ]
    unknown = [name for name in theirs if name not in ours]
    if lacking or unknown:
        what = f"has no {lacking[0]}" if lacking else f"has a setting {unknown[0]}"
        version = said.get("version", "unknown")
        msg = f"{file} {what}, so another version of WTFlow ({version}) wrote it: train the model again."
        raise ValueError(msg)
    flaws = misshapen(checkpoint) or [f"{name} is NaN or infinite" for name in broken_values(checkpoint)]
    if flaws:
        msg = f"{file} is broken, {flaws[0]}: give another checkpoint, or train the model again."
        raise ValueError(msg)


def misshapen(checkpoint: dict[str, Any]) -> list[str]:
    """Say what in a checkpoint is of another type or shape than whatever the settings it would be."""
    given = {"callbacks": {}, **checkpoint}
    flaws = [f"{name} is no {kind.__name__}" for name, kind in TYPES.items() if not isinstance(given.get(name), kind)]
    if not is_version(given["pytorch-lightning_version"]):
        flaws.append("pytorch-lightning_version is no version")
    state, names = checkpoint["state_dict"], checkpoint[KEY]["products"]
    codes = state.get("model.codes")
    if not isinstance(names, list) or (codes is not None and (codes.ndim == 0 or len(names) != len(codes))):
        flaws.append("its products are not those of its weights")
    scores, shown = (state.get(name, torch.empty(0)) for name in (SCORES, SHOWN))
    if scores.ndim != 1 or scores.shape != shown.shape:
        flaws.append(f"{SCORES} has another shape than its products")
    return flaws


def is_version(text: Any) -> bool:
    """Whether Lightning, which compares its version with that in a checkpoint, can read one."""
    try:
        Version(text)
    except (InvalidVersion, TypeError):
        return False
    return True


def load_state(module: nn.Module, state: Mapping[str, Tensor], version: Any, file: str, strict: bool = True) -> None:
    """Load a state dict.

    Args:
        module: What takes it.
        state: Tensors by name.
        version: Of the package that wrote it.
        file: What the message calls its checkpoint.
        strict: Whether all tensors must be there, and no others.

    Raises:
        ValueError: If a tensor is missing, superfluous or of another shape, as in a version with other layers.
    """
    try:
        module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        ours = module.state_dict()
        other = [name for name in {**ours, **state} if name not in ours or name not in state]
        other += [name for name in ours if name in state and ours[name].shape != state[name].shape]
        if all(name.startswith(POST) for name in other) and any(name not in ours for name in other):
            msg = (
                f"{file} has tensors of another post-processor than the model's ({other[0]}): give the model the one "
                "that it was trained with."
            )
            raise ValueError(msg) from error
        msg = (
            f"{file} has tensors of other names or shapes than the model ({', '.join(other[:1])}), so another version "
            f"of WTFlow ({version}) wrote it, or it is damaged: train the model again."
        )
        raise ValueError(msg) from error


def broken_values(checkpoint: dict[str, Any]) -> list[str]:
    """Name the values of a checkpoint on which scores and labels depend, and which are not finite.

    Thresholds that were never set are NaN and not broken: a training may go on from such a checkpoint, and no label is
    given without them. Those that are set in part are broken.
    """
    state: dict[str, Tensor] = checkpoint["state_dict"]
    broken = list(broken_tensors(state, "model."))
    scores = state.get(SCORES, torch.empty(0))
    if not (scores > -torch.inf).all():  # infinity is that of an image like no product
        broken.append(SCORES)
    together = _set_together(checkpoint)
    if len(scores) or not all(state[name].isnan().all() for name in together):
        broken += [name for name in together if not state[name].isfinite().all()]
    return broken


def _set_together(checkpoint: dict[str, Any]) -> list[str]:
    """Name what labels scores, of which all or none is set; for pixels, where some of it is set."""
    state, config = checkpoint["state_dict"], checkpoint.get("anomalib_post_processor_config") or {}
    if f"{POST}{RATE}" in state and checkpoint[KEY]["settings"]["false_alarm_rate"] is not None:
        parts = [["_image_threshold", "_pixel_threshold", RATE]]
    else:
        limits, ranges = ["_{}_threshold"], ["{}_min", "{}_max"]
        kinds = [limits] if config.get("enable_thresholding", True) else []
        kinds += [ranges] if config.get("enable_normalization", True) else []
        image = [name.format("image") for kind in kinds for name in kind]
        # Without masks anomalib sets no threshold for pixels, but their range.
        parts = [image, *([name.format("pixel") for name in kind] for kind in kinds)]
    first, *others = ([f"{POST}{name}" for name in part if f"{POST}{name}" in state] for part in parts)
    return first + [name for part in others if not all(state[name].isnan().all() for name in part) for name in part]


def _sides(value: Any) -> Any:
    """Height and width for one side: an image size of 64 is one of [64, 64]."""
    return [value, value] if isinstance(value, int) else value


def raise_for_other(
    checkpoint: dict[str, Any], settings: Settings, resuming: bool, file: str = "The checkpoint"
) -> None:
    """Refuse a checkpoint of another model: settings that fit can still change the scores under its threshold.

    Args:
        checkpoint: The checkpoint.
        settings: Of the model that is to take its weights; a false-alarm rate is that of its post-processor.
        resuming: Whether its training goes on.
        file: What the message calls it.

    Raises:
        ValueError: If it was trained with other settings.
    """
    theirs, ours = checkpoint[KEY]["settings"], settings.plain()
    names = [name for name, each in declared().items() if each.metadata["scores"] or (resuming and name in RESUME)]
    differing = [name for name in names if _sides(theirs.get(name)) != _sides(ours[name])]
    if differing:
        text = ", ".join(f"{name}={theirs.get(name)!r} (here {ours[name]!r})" for name in differing)
        msg = f"{file} was trained with {text}: give the model the same, as {option(differing[0])}."
        raise ValueError(msg)
    asked, trained = ours["false_alarm_rate"], theirs.get("false_alarm_rate")
    if not resuming and asked not in (trained, Settings.false_alarm_rate):
        rank_zero_warn(
            f"The checkpoint's threshold is for false_alarm_rate={trained}; {asked}, given here, changes nothing: "
            "set another with `anomalib-wtflow calibrate`."
        )
