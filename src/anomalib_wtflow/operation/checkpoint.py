"""A trained model from its checkpoint."""

from pathlib import Path

import torch

from anomalib_wtflow.lightning_model import WTFlow


def load_model(ckpt_path: str | Path) -> tuple[WTFlow, int, int]:
    """Load a trained model, in evaluation mode, its number of training steps, and how many of them an epoch had.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of a trained WTFlow model of this version.
    """
    model = WTFlow.load_from_checkpoint(ckpt_path, map_location="cpu").eval()
    if not model.model.normalization.fitted:
        msg = f"The model in '{ckpt_path}' is not trained: give a checkpoint written after training has begun."
        raise ValueError(msg)
    return model, model.trained_steps, model.trained_steps // max(1, model.trained_epochs)


def to_device(model: WTFlow, device: str) -> None:
    """Move a model to a device; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: If this machine cannot use the device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        msg = f"device is '{device}', which this machine cannot use: give auto, or one that torch finds ({error})."
        raise ValueError(msg) from error
