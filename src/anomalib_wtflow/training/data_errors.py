"""What anomalib's data modules fail with, in words that say what to do."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anomalib.data import Folder
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.path import resolve_path
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_wtflow.cli.errors import raised_here

FOLDERS = ("normal_dir", "normal_test_dir", "abnormal_dir", "mask_dir")
"""Arguments of anomalib's ``Folder`` that name folders."""


def explained(error: BaseException, datamodule: Any) -> str | None:
    """Say in one sentence why a data module cannot be set up; None for ours, and for one that is not known here."""
    while error.__cause__ is not None:  # of a product
        error = error.__cause__
    if raised_here(error.__traceback__):
        return None
    text, modules = str(error), list((getattr(datamodule, "members", None) or {"": datamodule}).values())
    train, test = (getattr(datamodule, f"{name}_data", None) for name in ("train", "test"))
    if test is not None and len(test) == 0 and "not enough values to unpack" in text:  # by anomalib's split of it
        count = len(train or ())
        if count < 2:
            return (
                f"The training set holds {count} normal images, too few to train and to set a threshold: give at "
                "least 2, and some hundred for a low false-alarm rate."
            )
        return (
            f"Of {count} normal images anomalib sets none aside to test and validate on: give at least 5, or folders "
            "of test images (normal_test_dir, abnormal_dir), or take --data Products, which needs 3."
        )
    none = getattr(datamodule, "val_split_mode", None) == ValSplitMode.NONE
    if none and isinstance(error, AttributeError) and "'val_data'" in text:
        return (
            "There is no validation set (val_split_mode none), which anomalib asks for in training: choose "
            "from_test or same_as_test, or give --trainer.limit_val_batches 0."
        )
    if empty := re.match(r"Found 0 \S+ images in (.+?)( with extensions|$)", text):
        return f"There are no images in '{empty[1]}': put images there, or give the data module another folder."
    if missing := re.match(r"Path does not exist: (.+)", text):
        return f"There is nothing at '{missing[1]}', where the data module looks for images: give it another folder."
    if foreign := re.match(r"Path contains non-printable characters: (.+)", text):
        return (
            f"anomalib's data modules read no path with characters beyond ASCII, such as '{foreign[1]}': take --data "
            "Products, which does, or rename the folder."
        )
    if test is None and isinstance(error, FileNotFoundError | MisMatchError | ValueError):
        folders = [module for module in modules if isinstance(module, Folder)]
        looks = (look(module) for look in (dangling, unpaired) for module in folders)
        return next(filter(None, looks), None)
    return None


def folders_of(module: Any, name: str) -> list[Path]:
    """List the folders that an argument of anomalib's ``Folder`` names."""
    given = getattr(module, name, None)
    given = [] if given is None else [given] if isinstance(given, str | Path) else given
    return [resolve_path(folder, module.root) for folder in given]


def images_in(folder: Path) -> Iterator[Path]:
    """Yield what anomalib takes for an image in a folder, at any depth, sorted."""
    files = (path for path in folder.glob("**/*") if path.suffix.lower() in IMG_EXTENSIONS and not path.is_dir())
    yield from sorted(files)


def dangling(module: Any) -> str | None:
    """Name an image of a ``Folder`` that is a link to nothing, or to itself."""
    for folder in (folder for name in FOLDERS for folder in folders_of(module, name)):
        for path in images_in(folder):
            if not path.exists():
                return f"The image '{path}' is a link that leads nowhere: remove it, or put an image there."
    return None


def unpaired(module: Any) -> str | None:
    """Name an image of a ``Folder`` without a mask, or a mask without an image."""
    for images, masks in zip(folders_of(module, "abnormal_dir"), folders_of(module, "mask_dir"), strict=False):
        pictures, outlines = list(images_in(images)), list(images_in(masks))
        for path in pictures:
            if not any(path.stem in mask.stem for mask in outlines):
                return f"The image '{path}' has no mask in '{masks}': put one there, or leave mask_dir out."
        for path in outlines:
            if not any(picture.stem in path.stem for picture in pictures):
                return f"The mask '{path}' is of no image in '{images}': remove it, or leave mask_dir out."
    return None
