"""Thresholds with a guaranteed false-alarm rate (split conformal prediction)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.products.recognition import Recognition


class ConformalThreshold(NamedTuple):
    """A threshold and the false-alarm rate that it guarantees."""

    threshold: Tensor
    false_alarm_rate: float


class Scores(NamedTuple):
    """Raw scores of good images, the maxima of their maps, and their products, ``(n,)`` each.

    The score of an image that shows no known product is infinite: it is anomalous whatever the threshold.
    """

    score: Tensor
    peak: Tensor
    index: Tensor  # type: ignore[assignment]  # not the method of tuples

    @classmethod
    def of(cls, score: Tensor, peak: Tensor, recognition: Recognition) -> "Scores":
        """Build them from what the model gave."""
        score = score.float().masked_fill(recognition.unknown, torch.inf)
        return cls(score.cpu(), peak.float().cpu(), recognition.index.cpu())


def conformal_threshold(scores: Tensor, false_alarm_rate: float) -> ConformalThreshold:
    """``k = n + 1 - floor(rate (n + 1))``: the k-th smallest of n normal scores.

    If the n scores and that of the next normal image are exchangeable, the next one exceeds the threshold with a
    probability of at most ``(n + 1 - k) / (n + 1) <= rate``, whatever the distribution. Where ``rate < 1 / (n + 1)``
    no threshold can promise that: the largest score is taken, which promises ``1 / (n + 1)``. (Vovk et al., 2005; its
    use here is ours.)

    Args:
        scores: Scores of n normal images that the model was not trained on, ``(n,)``; some may be infinite.
        false_alarm_rate: Rate in (0, 1).

    Returns:
        The threshold, above which a score is anomalous, and the rate that it guarantees.

    Raises:
        WTFlowError: If there are no scores, one is NaN, or so many are infinite that the threshold would be.
    """
    n = scores.numel()
    exceed = max(1, math.floor(round(false_alarm_rate * (n + 1), 9)))
    threshold = scores.sort().values[n - exceed] if n and not scores.isnan().any() else scores.new_tensor(torch.inf)
    if threshold.isinf():
        msg = (
            f"{n} scores of normal images, {n - int(scores.isfinite().sum())} of them NaN or infinite, give no "
            "threshold: check the calibration images."
        )
        raise WTFlowError(msg)
    return ConformalThreshold(threshold, exceed / (n + 1))


def images_needed(false_alarm_rate: float) -> int:
    """Return ``ceil(1 / rate) - 1``: the normal images that a rate needs (Vovk et al., 2005)."""
    return math.ceil(round(1 / false_alarm_rate, 9)) - 1
