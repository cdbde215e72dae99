"""A trained model: from its checkpoint, onto a device, over image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import read_image

from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.images import raise_for_broken, raise_for_deep
from anomalib_wtflow.lightning_model import WTFlow


def load_model(ckpt_path: str | Path) -> WTFlow:
    """Load a trained model, in evaluation mode.

    Raises:
        WTFlowError: If it is not a checkpoint of a trained WTFlow model of this version.
    """
    model = WTFlow.load_from_checkpoint(ckpt_path, map_location="cpu").eval()
    if not model.model.fitted:
        msg = f"The model in '{ckpt_path}' is not trained: give a checkpoint that a whole training has written."
        raise WTFlowError(msg)
    return model


def to_device(model: WTFlow, device: str) -> None:
    """Move a model to a device; ``auto`` is a GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)


@torch.no_grad()
def score_files(model: WTFlow, paths: Sequence[str]) -> Scores:
    """Score image files as the model does in production.

    Raises:
        WTFlowError: If an image has more than 8 bits a channel, or its score or map is NaN or infinite.
    """
    raise_for_deep(paths)
    transform: Any = getattr(model.pre_processor, "transform", None) or torch.nn.Identity()
    parts = []
    for path in paths:
        raw = model.model(transform(read_image(path, as_tensor=True))[None].to(model.device))
        raise_for_broken("score", [path], raw.pred_score, raw.anomaly_map)
        parts.append(Scores.of(raw.pred_score, raw.anomaly_map.flatten(1).amax(dim=1), raw.recognition))
    return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))
