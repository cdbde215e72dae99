"""The data sets that a run goes through, and the files that they list."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader


def datasets_of(loaders: Any) -> list[Any]:
    """Return the data sets of a loader, or of several in a list or dict; None for a loader without one."""
    return [getattr(loader, "dataset", None) for loader in CombinedLoader(loaders, "sequential").flattened]


def datasets(trainer: Trainer) -> list[Any]:
    """Return the data sets that a test or a prediction goes through, as :func:`datasets_of`."""
    return datasets_of(trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders)


def image_paths(dataset: Any, masks: bool = True) -> list[str]:
    """List the image files of an anomalib data set, and those of its masks; empty for any other data set."""
    samples = getattr(dataset, "samples", None)
    if samples is None:
        return [str(path) for path in getattr(dataset, "image_filenames", [])]
    names = ("image_path", "mask_path") if masks else ("image_path",)
    columns = [samples[name] for name in names if name in samples]
    return [path for column in columns for path in column if isinstance(path, str) and path]
