"""A folder in MVTec's layout, as anomalib's ``Folder``."""

from pathlib import Path
from typing import Any

from anomalib.data import Folder
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_wtflow.errors import WTFlowError

GOOD = "train/good"


def has_images(path: Path) -> bool:
    """Return whether a folder holds an image, at any depth."""
    return path.is_dir() and any(file.suffix.lower() in IMG_EXTENSIONS for file in path.rglob("*"))


def mvtec_layout(root: Path, **kwargs: Any) -> Folder:
    """Build a data module from a folder in MVTec's layout.

    Args:
        root: The folder of ``train/good``, ``test/<kind>`` and, for all kinds, ``ground_truth/<kind>``; it gives the
            data module its name.
        **kwargs: Further arguments of ``Folder``.

    Raises:
        WTFlowError: If there are no good training images, or a kind of defect is named like ``good``, as ``Good``.
    """
    if not has_images(root / GOOD):
        msg = f"'{root}' has no training images: put good images into '{root / GOOD}'."
        raise WTFlowError(msg)
    test = root / "test"
    kinds = sorted(kind.name for kind in test.iterdir() if has_images(kind)) if test.is_dir() else []
    if like := [kind for kind in kinds if kind != "good" and kind.strip().lower() == "good"]:
        msg = f"'{test / like[0]}' would count as a kind of defect: rename it to 'good', or after the defect."
        raise WTFlowError(msg)
    defects = [kind for kind in kinds if kind != "good"]
    masks = [root.absolute() / "ground_truth" / defect for defect in defects]
    return Folder(
        name=root.name,
        root=root,
        normal_dir=GOOD,
        normal_test_dir="test/good" if "good" in kinds else None,
        abnormal_dir=[f"test/{defect}" for defect in defects] or None,
        mask_dir=masks if masks and all(has_images(mask) for mask in masks) else None,
        **kwargs,
    )
