"""Files that are written whole or not at all, and why one cannot be: libraries' errors seldom say which, or why."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that only writing gives."""
ROOM = 2**20
"""Bytes that a folder is asked to take."""


@contextmanager
def one_sentence_for(what: str, place: Path, way: str) -> Iterator[None]:
    """Say what cannot be written where, and what else to do, if that is why something fails.

    Args:
        what: What is written, as the beginning of a sentence.
        place: Its file or folder.
        way: What to do about it, as the end of a sentence.

    Raises:
        RuntimeError: If something fails and the disk is full or the folder cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = said(error, place) or refusal(place)
        if reason is None:
            raise
        msg = f"{what} cannot be written to {place} ({reason}): {way}."
        raise RuntimeError(msg) from error


def said(error: Exception, place: Path) -> str | None:
    """Return the reason that an error gives, if it is of writing: by what it is, or by a file that it names.

    That is the place, one beside or below it, or a folder that it is in; an image that is read lies elsewhere.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return None
    ours = error.errno in FULL
    if error.filename is not None:
        place, named = place.absolute(), Path(os.fsdecode(error.filename)).absolute()
        ours = ours or named in (place, *place.parents) or place.parent in named.parents
    return os.strerror(error.errno) if ours else None


def refusal(place: Path) -> str | None:
    """Return why a folder, or that of a file, takes no megabyte more; None if it does."""
    folder = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        return error.strerror
    return None


def replace_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file's bytes beside its place and rename it: all of them or, if that fails, none.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on no content
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
