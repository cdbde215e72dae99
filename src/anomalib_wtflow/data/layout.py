"""Folders of images, of any name, and a folder in MVTec's layout, as anomalib's ``Folder``."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from anomalib.data import Folder
from anomalib.data.utils.path import resolve_path
from torchvision.datasets.folder import IMG_EXTENSIONS

GOOD = "train/good"
FOLDERS = ("normal_dir", "normal_test_dir", "abnormal_dir", "mask_dir")


def has_images(path: Path) -> bool:
    """Whether a folder holds an image, at any depth."""
    return path.is_dir() and any(file.suffix.lower() in IMG_EXTENSIONS for file in path.rglob("*"))


@contextmanager
def plain_paths() -> Iterator[Any]:
    """Give a function that makes a folder's path one of ASCII characters, while the context lasts.

    anomalib 2.7 refuses any other path that it is given, but resolves links, so that images keep their own names.
    """
    with ExitStack() as stack:

        def plain(path: Path) -> Path:
            if str(path.resolve()).isascii():
                return path
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="wtflow-"))
                link = Path(folder) / "images"
                link.symlink_to(path.resolve(), target_is_directory=True)
            except OSError:  # no folder for temporary files; and Windows asks for a right to link
                return path
            return link

        yield plain


class AnyFolder(Folder):
    """anomalib's ``Folder``, whose folders may have any name."""

    def _setup(self, _stage: str | None = None) -> None:
        given = {name: getattr(self, name) for name in FOLDERS}
        try:
            with plain_paths() as plain:
                for name, folders in given.items():
                    if folders is not None:
                        listed = [folders] if isinstance(folders, str | Path) else folders
                        setattr(self, name, [plain(resolve_path(folder, self.root)) for folder in listed])
                super()._setup(_stage)
        finally:
            for name, folders in given.items():
                setattr(self, name, folders)


def mvtec_layout(root: Path, **kwargs: Any) -> Folder:
    """Build a data module of a folder with ``train/good``, ``test/<kind>`` and, for all kinds, ``ground_truth/<kind>``.

    Args:
        root: The folder; the data module is called as it is.
        **kwargs: Further arguments of ``Folder``.

    Raises:
        ValueError: If there are no good training images, or a kind of defect is named ``good`` but for its case.
    """
    if not has_images(root / GOOD):
        msg = f"'{root}' has no training images: put good images into '{root / GOOD}'."
        raise ValueError(msg)
    test = root / "test"
    kinds = sorted(kind.name for kind in test.iterdir() if has_images(kind)) if test.is_dir() else []
    if like := [kind for kind in kinds if kind != "good" and kind.strip().lower() == "good"]:
        msg = (
            f"'{test / like[0]}' is named like 'good', and would be a kind of defect: rename it to 'good', or to what "
            "its defects are."
        )
        raise ValueError(msg)
    defects = [kind for kind in kinds if kind != "good"]
    masks = [root.absolute() / "ground_truth" / defect for defect in defects]
    return AnyFolder(
        name=root.name,
        root=root,
        normal_dir=GOOD,
        normal_test_dir="test/good" if "good" in kinds else None,
        abnormal_dir=[f"test/{defect}" for defect in defects] or None,
        mask_dir=masks if masks and all(has_images(mask) for mask in masks) else None,
        **kwargs,
    )
