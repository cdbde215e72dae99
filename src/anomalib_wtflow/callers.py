"""Which function of anomalib's is being called, where no argument says it (ours)."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def call_of(function: Callable[..., Any]) -> FrameType | None:
    """Return the innermost call of a function that has not ended, in this thread; None if there is none."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame
