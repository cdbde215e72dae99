"""Errors of a model's arguments, as the command line should show them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_sentence() -> Iterator[None]:
    """Let the command line end with an argument's error and nothing else; in Python the error stays as it is.

    jsonargparse catches what a constructor raises, and puts it above a listing of all arguments and two tracebacks.

    Raises:
        SystemExit: If anomalib's command line builds the model, as it also ends for what does not parse.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if _under_command_line():
            raise SystemExit(f"error: {error}") from error
        raise


def _under_command_line() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("anomalib.cli"):
            return True
    return False
