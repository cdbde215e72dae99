"""Errors of this package, as the command line should show them: one sentence."""

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from anomalib_wtflow.cli.quiet import under_command

SAID = (ValueError, RuntimeError, OSError)
"""Types of the errors that this package raises with a sentence."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Let the command line end with an argument's error and nothing else; in Python the error stays as it is.

    jsonargparse catches what a constructor raises, and puts it above a listing of all arguments and two tracebacks.

    Raises:
        SystemExit: If anomalib's command line builds the model, as it also ends for what does not parse.
    """
    try:
        yield
    except SAID as error:
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


def plain_errors() -> None:
    """Let the command ``anomalib`` end with the sentence of an error of ours, without 100 to 400 lines of traceback.

    Any other error, one of torch's in our lines too, keeps what was to be shown of it; so does every Python program.
    """
    if under_command() and not isinstance(sys.excepthook, _Plain):
        sys.excepthook = _Plain(sys.excepthook)


class _Plain:
    """Shows our errors as a sentence, and leaves others to what showed them before."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, SAID) and raised_here(trace):
            sys.stderr.write(f"error: {error}\n")
        else:
            self.before(kind, error, trace)


def raised_here(trace: TracebackType | None) -> bool:
    """Whether a ``raise`` of this package is the origin of an error, rather than a call in one of its lines."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code, ours = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "").startswith("anomalib_wtflow")
    return ours and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
