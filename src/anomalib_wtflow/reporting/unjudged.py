"""What a prediction has not judged: it is said, since nothing said would look like nothing found."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from anomalib.data.utils.image import is_image_file
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from anomalib_wtflow.callers import call_of
from anomalib_wtflow.reporting.verdicts import datasets

NAMED = 5
"""Most files that a sentence names."""
USUAL = ("thumbs.db", "desktop.ini")
"""Files that a system leaves in folders, hidden ones aside."""


def first_few(names: Sequence[str]) -> str:
    """List some names, and say how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def unlisted(folder: Path, listed: Iterable[str | Path]) -> list[str]:
    """Name the files at any depth of a folder that are not among those listed, and links to folders, sorted.

    anomalib lists files by their extensions, and follows no link to a folder. Hidden files, and :data:`USUAL` ones, are
    nobody's images.
    """
    root, known = folder.resolve(), {Path(path).absolute() for path in listed}
    names = []
    for path in root.rglob("*"):
        below = path.relative_to(root)
        nobodys = path.name.lower() in USUAL or any(part.startswith(".") for part in below.parts)
        if (path.is_symlink() or not path.is_dir()) and not nobodys and path not in known:
            names.append(below.as_posix())
    return sorted(names)


def warn_of_unlisted(folder: Path, listed: Iterable[str | Path], what: str) -> None:
    """Say what of a folder is left out, if something is.

    Args:
        folder: The folder.
        listed: Its files that are looked at.
        what: What is not done with the others, such as ``judged``.
    """
    names = unlisted(folder, listed)
    if names:
        files, verb = ("files", "were") if len(names) > 1 else ("file", "was")
        rank_zero_warn(
            f"{len(names)} {files} in '{folder}' {verb} not {what}, since anomalib knows images by their extensions "
            f"and follows no link to a folder: {first_few([repr(name) for name in names])}; convert what shows a part "
            "to PNG, or put it there."
        )


def folder_of(paths: Sequence[Path]) -> Path | None:
    """Find the folder whose images a data set for prediction lists, which keeps no path; None if it lists none.

    It is the folder that ``Engine.predict`` was given, or else the one that all its images are in, if that has no
    others: then it was not given some of them.
    """
    given = given_to_predict()
    if given is not None:
        return given if given.resolve() in paths[0].parents and given.is_dir() else None
    common = Path(os.path.commonpath([path.parent for path in paths]))
    alone = len(paths) == 1  # a file that was given by itself
    return None if alone or {path for path in common.rglob("*") if is_image_file(path)} - set(paths) else common


def given_to_predict() -> Path | None:
    """Return the ``data_path`` of anomalib's ``Engine.predict``, if that is being called with one."""
    from anomalib.engine import Engine  # which imports the models first

    call = call_of(Engine.predict)
    path = None if call is None else call.f_locals.get("data_path")
    return None if path is None else Path(path)


class Unjudged(Callback):
    """Name the files of a folder that were not judged, after the verdicts on the others."""

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at the folder of each data set once more."""
        del pl_module
        for dataset in datasets(trainer):
            if isinstance(dataset, PredictDataset):
                folder = folder_of(dataset.image_filenames)
                if folder is not None:
                    warn_of_unlisted(folder, dataset.image_filenames, "judged")
