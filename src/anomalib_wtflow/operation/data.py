"""The data of a command: anomalib's data modules, its data configs, and folders."""

from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data import AnomalibDataModule, PredictDataset, get_datamodule
from omegaconf import OmegaConf

from anomalib_wtflow.data.layout import GOOD, mvtec_layout
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.products.datamodule import Products


class DataSets(NamedTuple):
    """Training images (None if there are none) and test images."""

    train: Any | None
    test: Any


def data_sets(data: AnomalibDataModule | str | Path) -> DataSets:
    """Find the training and the test images.

    Args:
        data: anomalib data module; or a YAML file with anomalib's data config, by itself or below ``data``; or a folder
            in MVTec's layout, or of such folders, one for each product; or a folder of images without labels.

    Returns:
        anomalib data sets, whose items have ``image``, and ``gt_label`` and ``gt_mask`` if they are labelled.

    Raises:
        WTFlowError: If there are no test images in it.
    """
    if not isinstance(data, AnomalibDataModule):
        path = Path(data)
        if path.suffix.lower() in (".yaml", ".yml"):
            data = get_datamodule(OmegaConf.load(path))
        elif (path / "test").is_dir():
            data = mvtec_layout(path, num_workers=0, val_split_mode="same_as_test")
        elif any((folder / GOOD).is_dir() for folder in path.glob("*")):
            data = Products(root=path)
        else:
            return DataSets(None, PredictDataset(path))
    data.prepare_data()
    data.setup()
    if len(data.test_data) == 0:
        msg = f"The data module {data.name} has no test images: give it some, good and defective."
        raise WTFlowError(msg)
    return DataSets(data.train_data, data.test_data)
