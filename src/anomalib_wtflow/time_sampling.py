"""Times at which the field is trained."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from anomalib_wtflow._registry import lookup

TimeSamplingName = Literal["uniform", "logit_normal"]
TimeSampling = Callable[[int], Tensor]
"""Draws ``(N,)`` times in (0, 1) for a number N."""


def uniform(start_time: float) -> TimeSampling:
    """``t ~ U(0, 1)`` (arXiv 2508.05461v3)."""
    del start_time
    return lambda count: torch.rand(count)


def logit_normal(start_time: float) -> TimeSampling:
    """``t = sigmoid(logit(t_s) + z)``, ``z ~ N(0, 1)``: near the start time t_s, where the field is asked (ours).

    Raises:
        ValueError: If the start time is 0, whose logit is not finite.
    """
    if start_time <= 0:
        msg = f"time_sampling 'logit_normal' is centred at start_time, which is {start_time}: choose uniform."
        raise ValueError(msg)
    centre = math.log(start_time / (1 - start_time))
    return lambda count: torch.sigmoid(centre + torch.randn(count))


TIME_SAMPLINGS: dict[str, Callable[[float], TimeSampling]] = {"uniform": uniform, "logit_normal": logit_normal}


def get_time_sampling(name: str, start_time: float) -> TimeSampling:
    """Return a time sampling by name, for the start time of inference.

    Raises:
        ValueError: If the name is unknown, or the sampling does not go with the start time.
    """
    return lookup(TIME_SAMPLINGS, "time_sampling", name)(start_time)
