"""Errors of this package, as the command line should show them: one sentence."""

import dis
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from anomalib_wtflow.cli.quiet import under_command

SAID = (ValueError, RuntimeError, OSError)
"""Types of the errors that this package raises with a sentence."""
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Errors of a system that forbids something, to a user or on a disk that is read-only, or finds a file on the way."""
PATHS = ("anomalib.data.utils.path", "anomalib.data.utils.image")
"""Where anomalib says in a sentence that a path is missing, empty or of characters that it does not read."""


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
            raise SystemExit(f"error: {sentence_of(error) or error}") from error
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

    So it does with anomalib's own sentence of a path, which it says before it asks the model, and with a system's error
    of a place that cannot be used (:func:`sentence_of`). Any other error, one of torch's in our lines too, keeps what
    was to be shown of it; so does every Python program.
    """
    if under_command() and not isinstance(sys.excepthook, _Plain):
        sys.excepthook = _Plain(sys.excepthook)


class _Plain:
    """Shows our errors as a sentence, and leaves others to what showed them before."""

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = sentence_of(error)
        if sentence is None:
            self.before(kind, error, trace)
        else:
            sys.stderr.write(f"error: {sentence}\n")


def raised_here(trace: TracebackType | None) -> bool:
    """Whether a ``raise`` of this package is the origin of an error, rather than a call in one of its lines."""
    return _raised_in(trace, ("anomalib_wtflow",))


def _raised_in(trace: TracebackType | None, modules: Sequence[str]) -> bool:
    """Whether a ``raise`` in one of some modules, or of those in them, is the origin of an error."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code, name = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
    inside = any(name == module or name.startswith(f"{module}.") for module in modules)
    return inside and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def sentence_of(error: BaseException) -> str | None:
    """Return the sentence that says all that a user needs of an error, if there is one.

    Its text, if it is ours, or anomalib's of a path that it was given; or which place cannot be used and why, if
    a system says that, whoever asked.
    """
    if isinstance(error, SAID) and _raised_in(error.__traceback__, ("anomalib_wtflow", *PATHS)):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        place = Path(os.fsdecode(error.filename)).absolute()
        return f"'{place}' cannot be used ({error.strerror}): see to that, or give another place."
    return None
