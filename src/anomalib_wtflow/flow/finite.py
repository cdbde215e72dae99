"""Numbers that are NaN or infinite: an image with one of them is neither normal nor anomalous (ours)."""

import torch
from torch import Tensor


def finite(*values: Tensor) -> Tensor:
    """Return whether all numbers of each image are finite, ``(N,)``, from tensors ``(N, ...)``."""
    whole = [each.isfinite() for each in values]
    return torch.stack([each if each.ndim == 1 else each.flatten(1).all(dim=1) for each in whole]).all(dim=0)


def nan_unless_finite(score: Tensor, *seen: Tensor) -> Tensor:
    """Return scores ``(N,)``, NaN where a number of what they were made from, tensors ``(N, ...)``, is not finite.

    A NaN does not reach the score by itself: the activations of OpenVINO turn it into 0, a ReLU turns -inf into 0.
    """
    return torch.where(finite(*seen), score, torch.nan)
