"""Times at which the field is trained."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from anomalib_wtflow.flow.registry import lookup

TimeSamplingName = Literal["uniform", "logit_normal"]
TimeSampling = Callable[[int], Tensor]
"""Draws ``(N,)`` times in (0, 1) for a number N."""


def uniform(count: int, start_time: float = 0.0) -> Tensor:
    """``t ~ U(0, 1)`` (arXiv 2508.05461v3)."""
    del start_time
    return torch.rand(count)


def logit_normal(count: int, start_time: float) -> Tensor:
    """``t = sigmoid(logit(t_s) + z)``, ``z ~ N(0, 1)``: near the start time t_s, where the field is asked (ours)."""
    return torch.sigmoid(math.log(start_time / (1 - start_time)) + torch.randn(count))


TIME_SAMPLINGS: dict[str, Callable[..., Tensor]] = {"uniform": uniform, "logit_normal": logit_normal}


def get_time_sampling(name: str, start_time: float) -> TimeSampling:
    """Return a time sampling by name, for the start time of inference.

    Raises:
        ValueError: If the name is unknown, or the sampling does not go with the start time.
    """
    draw = lookup(TIME_SAMPLINGS, "time_sampling", name)
    if draw is logit_normal and start_time <= 0:
        msg = f"time_sampling '{name}' is centred at start_time, which is {start_time}: choose uniform."
        raise ValueError(msg)
    return partial(draw, start_time=start_time)
