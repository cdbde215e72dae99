"""The data sets of the benchmarks, by name; they need no masks."""

from pathlib import Path
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, get_datamodule
from torch import Tensor
from torch.nn import functional as F

from anomalib_wtflow import SyntheticParts
from anomalib_wtflow.data.layout import mvtec_layout

SHARED = Path(__file__).parents[2] / "shared" / "data"
FOLDERS = {name: SHARED / name for name in ("mvtec_bottle", "magnetic_tile", "screw", "elpv_mono")}
FOLDERS["mvtec_bottle"] /= "bottle"
REAL = ("mvtec_bottle", "magnetic_tile")
"""Those with masks, by which the defaults were chosen."""
DATA = (*FOLDERS, "synthetic")
"""What the benchmarks of accuracy take by default."""
MORE = {"ball_screw": SHARED / "ball_screw"}
"""What may be asked for besides."""


def data_module(name: str, root: Path | None = None, batch_size: int = 32) -> AnomalibDataModule:
    """Build a data module whose whole test set is tested, and set it up.

    Validation is the test set again, since anomalib 2.7 fails without one; the benchmark runs no validation.

    Args:
        name: One of :data:`DATA` or :data:`MORE`, a folder in MVTec's layout, or a class of ``anomalib.data`` with its
            category, as ``MVTecAD:screw``, ``Visa:candle``, ``BTech:01``.
        root: Folder of the last kind; None for anomalib's default.
        batch_size: Training batch size.

    Raises:
        FileNotFoundError: If there is no such data set.
    """
    options: dict[str, Any] = {"train_batch_size": batch_size, "num_workers": 0, "val_split_mode": "same_as_test"}
    folder = {**FOLDERS, **MORE}.get(name, Path(name))
    if name == "synthetic":
        module: AnomalibDataModule = SyntheticParts(**options)
    elif ":" in name and not folder.exists():
        kind, category = name.split(":", 1)
        options |= {"category": category, **({"root": str(root)} if root else {})}
        module = get_datamodule({"class_path": f"anomalib.data.{kind}", "init_args": options})
    elif folder.is_dir():
        module = mvtec_layout(folder, **options)
    else:
        choices = f"{', '.join((*DATA, *MORE))}, a folder in MVTec's layout, or a class and category as MVTecAD:screw"
        raise FileNotFoundError(f"There is no data set '{name}': give one of {choices}.")
    module.prepare_data()
    module.setup()
    return module


def has_masks(module: AnomalibDataModule) -> bool:
    """Whether the test images' defects are marked."""
    return module.test_data.task == TaskType.SEGMENTATION


def every_fourth_pixel(item: Any, size: tuple[int, int] | torch.Size) -> Tensor:
    """Return an item's mask, scaled to a map's size, at every fourth pixel in each direction; True is a defect."""
    mask = torch.zeros(size) if item.gt_mask is None else item.gt_mask.squeeze().float()
    return F.interpolate(mask[None, None], tuple(size), mode="nearest")[0, 0, 2::4, 2::4] > 0.5
