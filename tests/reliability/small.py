"""A small model and its data, for faults in data: drawn parts of 64 pixels, and a second of training."""

from pathlib import Path
from typing import Any

from anomalib.data import Folder

from anomalib_wtflow import WTFlow


def model(**kwargs: Any) -> WTFlow:
    """Two epochs, no pictures."""
    options = {"max_epochs": 2, "image_size": 64, "false_alarm_rate": 0.2, "overrides": {"plateau": 0.0}}
    return WTFlow(**{"visualizer": False, **options, **kwargs})


def folder(root: Path, **kwargs: Any) -> Folder:
    """The good parts and the scratched ones, as a user would give them to anomalib's ``Folder``."""
    options = {"num_workers": 0, "train_batch_size": 4, "seed": 0, **kwargs}
    return Folder("parts", "train/good", root, "test/scratch", "test/good", "ground_truth/scratch", **options)
