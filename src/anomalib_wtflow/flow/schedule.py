"""Learning-rate schedules by name."""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def cosine(total: float) -> Schedule:
    """``(1 + cos(pi k / K)) / 2`` at step k of K."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))


def step(total: float) -> Schedule:
    """``0.1^floor(3 k / K)``: the paper's StepLR; its step size, K / 3, is ours."""
    return lambda step: 0.1 ** min(int(3 * step / total), 2)


def constant(total: float) -> Schedule:
    """``1``: averaged weights need neither a decay nor a known end (ours)."""
    del total
    return lambda _: 1.0


SCHEDULERS: dict[str, Callable[[float], Schedule]] = {"constant": constant, "cosine": cosine, "step": step}
"""Each takes the total number of steps K, possibly infinite, and gives the factor on the learning rate at step k."""
