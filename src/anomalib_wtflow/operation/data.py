"""The data of a command: anomalib's data modules, its data configs, and folders."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data import AnomalibDataModule, PredictDataset, UnknownDatamoduleError, get_datamodule
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from anomalib_wtflow.data.layout import mvtec_layout, plain_paths
from anomalib_wtflow.data.products import Products
from anomalib_wtflow.reporting.unjudged import warn_of_unlisted
from anomalib_wtflow.training.data_errors import explained


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
        FileNotFoundError: If there is no such file or folder.
        ValueError: If there are no test images in it, or it cannot be set up for a reason that :func:`explained` knows;
            any other error of a data module is raised as it is.
    """
    if not isinstance(data, AnomalibDataModule):
        path = Path(data)
        if not path.exists():
            msg = f"There is no data at '{data}': give a folder, a YAML file, or the name of an anomalib data module."
            raise FileNotFoundError(msg)
        if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
            data = from_config(path)
        elif (path / "test").is_dir():
            data = mvtec_layout(path, num_workers=0, val_split_mode="same_as_test")
        elif any((folder / "train" / "good").is_dir() for folder in path.glob("*")):
            data = Products(root=path)
        else:
            return DataSets(None, images_of(path))
    data.prepare_data()
    try:
        data.setup()
    except Exception as error:
        sentence = explained(error, data)
        if sentence is None:  # ours, or of a data module that says what it says
            raise
        raise ValueError(sentence) from error
    if len(data.test_data) == 0:
        msg = f"The data module {data.name} has no test images: give it some, good and defective."
        raise ValueError(msg)
    return DataSets(data.train_data, data.test_data)


def images_of(path: Path) -> PredictDataset:
    """Images of a folder, or one image, without labels; of other files in it a warning.

    Raises:
        ValueError: If there are none.
    """
    try:
        with plain_paths() as plain:
            images = PredictDataset(plain(path))
    except (RuntimeError, ValueError) as error:
        msg = f"There are no images in '{path}': give a folder of images, or one in MVTec's layout, or a YAML file."
        raise ValueError(msg) from error
    if path.is_dir():
        warn_of_unlisted(path, images.image_filenames, "used")
    return images


def from_config(path: Path) -> AnomalibDataModule:
    """Build the data module of a YAML file with ``class_path`` and ``init_args``, by itself or below ``data``.

    Raises:
        ValueError: If it is no YAML, has no ``class_path``, or names a data module that anomalib does not have.
    """
    config: Any = None
    with suppress(YAMLError, UnicodeDecodeError):
        config = OmegaConf.load(path)
    if isinstance(config, DictConfig):
        config = config.get("data", config)
    if not isinstance(config, DictConfig) or "class_path" not in config:
        msg = f"'{path}' holds no data config: give 'class_path' and 'init_args', by themselves or below 'data'."
        raise ValueError(msg)
    try:
        return get_datamodule(config)
    except UnknownDatamoduleError as error:
        msg = f"'{path}' names '{config.class_path}', which is no data module of anomalib: give one, such as Folder."
        raise ValueError(msg) from error
