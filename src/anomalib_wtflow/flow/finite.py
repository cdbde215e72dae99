"""NaN and infinity: an image with one of them is neither normal nor anomalous (ours)."""

import torch
from torch import Tensor


def finite(*values: Tensor) -> Tensor:
    """Return whether all numbers of each image are finite, ``(N,)``; tensors ``(N, ...)``."""
    return torch.stack([_finite(each.flatten(1) if each.ndim > 1 else each[:, None]) for each in values]).all(dim=0)


def _finite(rows: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # a runtime may add up in float16, which ends at 65504
        return rows.isfinite().all(dim=1)
    return rows.float().sum(dim=1).isfinite()  # a tenth of the time


def nan_unless_finite(score: Tensor, *seen: Tensor) -> Tensor:
    """Return scores ``(N,)``, NaN where a number of the image in ``seen`` is not finite.

    A NaN does not reach the score by itself: the activations of OpenVINO turn it into 0, a ReLU turns -inf into 0.
    """
    return torch.where(finite(*seen), score, torch.nan)
