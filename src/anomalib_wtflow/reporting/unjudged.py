"""What a prediction has not judged, or judged though it is no part: nothing said would look like nothing found."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from anomalib.data.utils.image import is_image_file
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from anomalib_wtflow.callers import call_of
from anomalib_wtflow.reporting.data_sets import datasets

NAMED = 5
"""Most files, or kinds of them, that a sentence names."""
USUAL = ("thumbs.db", "desktop.ini")
"""Files that a system leaves in folders, hidden ones aside."""


def first_few(names: Sequence[str]) -> str:
    """List some names, and say how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def quoted(names: Sequence[str]) -> str:
    """List some names as they are written, and say how many more there are."""
    return first_few([repr(name) for name in names])


def unlisted(folder: Path, listed: Iterable[str | Path], own: Path | None = None) -> list[Path]:
    """Find the files at any depth of a folder that are not among those listed, sorted.

    anomalib lists files by their extensions, and looks in no folder that is a link or may not be read: these are found
    too. Hidden files, and :data:`USUAL` ones, are nobody's images, nor are those in the folder ``own``.
    """
    root, known = folder.resolve(), {Path(path).absolute() for path in listed}
    found = []
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        nobodys = hidden or path.name.lower() in USUAL or own in (path, *path.parents)
        if not nobodys and path not in known and kind_of(path) != "folder":
            found.append(path)
    return sorted(found)


def kind_of(path: Path) -> str:
    """Say what keeps anomalib from listing a file: its extension, as a rule; ``image`` if nothing does."""
    if path.is_dir():
        readable = os.access(path, os.R_OK | os.X_OK)
        return "link to a folder" if path.is_symlink() else "folder" if readable else "folder that may not be read"
    return "image" if is_image_file(path) else path.suffix.lower() or "without extension"


def warn_of_unlisted(folder: Path, listed: Iterable[str | Path], what: str, own: Path | None = None) -> None:
    """Say what of a folder is left out, if something is; the rarest kinds first, which notes beside images are not.

    Args:
        folder: The folder.
        listed: Its files that are looked at.
        what: What is not done with the others, such as ``judged``.
        own: A folder of ours, which may be in it.
    """
    names: dict[str, list[str]] = {}
    for path in unlisted(folder, listed, own):
        names.setdefault(kind_of(path), []).append(path.relative_to(folder.resolve()).as_posix())
    late = names.pop("image", [])
    if late:
        rank_zero_warn(
            f"{len(late)} of the images in '{folder}' not {what}, since they came after it was listed: "
            f"{quoted(late)}; run it again."
        )
    if names:
        count = sum(map(len, names.values()))
        kinds = sorted(names, key=lambda kind: (len(names[kind]), kind))
        rank_zero_warn(
            f"{count} file{'s' * (count > 1)} in '{folder}' not {what}, since anomalib knows images by their "
            "extensions, and follows no links to folders: "
            f"{first_few([f'{len(names[kind])} {kind} ({names[kind][0]!r})' for kind in kinds])}; convert what shows a "
            "part to PNG, or put it there."
        )


def warn_of_pictures(listed: Sequence[Path], results: Path) -> None:
    """Say how many of the images are pictures that runs have written, if some are: they are judged like parts.

    Args:
        listed: The images.
        results: The folder that runs write into.
    """
    count = sum(results in path.absolute().parents for path in listed)
    if count:
        rank_zero_warn(
            f"{count} of the {len(listed)} images lie in '{results}', where runs put their pictures, and were judged "
            "as if they were parts: move that folder out of the one that is judged, and run it again with another "
            "--default_root_dir."
        )


def results_of(trainer: Trainer, pl_module: Any) -> Path:
    """Return the folder that a model's runs write into: anomalib's, of the model's name, or else this run's own."""
    own = Path(trainer.default_root_dir).resolve()
    return next((folder for folder in own.parents if folder.name == type(pl_module).__name__), own)


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
    """End a prediction that a machine stops, and name the files of a folder that were not judged, or are pictures."""

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop after a SIGTERM, which Lightning looks at in training and in tests alone.

        Raises:
            SIGTERMException: If there was one.
        """
        del args, kwargs
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Look at the folder of each data set once more, after the verdicts."""
        results = results_of(trainer, pl_module)
        for dataset in datasets(trainer):
            if isinstance(dataset, PredictDataset):
                folder, listed = folder_of(dataset.image_filenames), dataset.image_filenames
                warn_of_pictures(listed, results)
                if folder is not None:
                    warn_of_unlisted(folder, listed, "judged", results)
