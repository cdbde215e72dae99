"""Check of the image files: one clear sentence instead of a worker's traceback."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from anomalib_wtflow.reporting.data_sets import datasets_of, image_paths
from anomalib_wtflow.training.data_errors import explained

NOT_IMAGES = (".npy", ".mp4", ".avi")
"""Files that anomalib reads by other means."""
LOADERS = {
    TrainerFn.FITTING: ("train_dataloader", "val_dataloaders"),
    TrainerFn.VALIDATING: ("val_dataloaders",),
    TrainerFn.TESTING: ("test_dataloaders",),
    TrainerFn.PREDICTING: ("predict_dataloaders",),
}
"""Where a trainer keeps the loaders of a run; those of the run before it keeps, too."""


def flaw(path: str, decode: bool) -> str | None:
    """Say why an image file does not open or, with ``decode``, not all of it decodes; None if it does.

    The reason is the system's, such as that permission was denied; empty where the file is at fault.
    """
    if Path(path).suffix.lower() in NOT_IMAGES:
        return None if Path(path).is_file() else ""
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
    except OSError as error:
        return error.strerror or ""
    except (SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return None


def named(paths: list[str]) -> str:
    """Name the first of some image files, and say how many more there are."""
    more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
    return f"The image '{paths[0]}'{more}"


def raise_for_unreadable(datasets: Iterable[Any], decode: bool, cause: BaseException | None = None) -> None:
    """Name the first file of the data sets that is not a whole image, if there is one.

    Raises:
        ValueError: If there is one.
    """
    paths = sorted({path for dataset in datasets for path in image_paths(dataset)})
    flaws = {path: reason for path in paths if (reason := flaw(path, decode)) is not None}
    if flaws:
        reason = next(iter(flaws.values()))
        cannot = f"cannot be read ({reason})" if reason else "cannot be read"
        way = "see to that or remove it" if reason else "remove it or replace it by a whole file"
        msg = f"{named(list(flaws))} {cannot}: {way}, and run again."
        raise ValueError(msg) from cause


def raise_for_deep(datasets: Iterable[Any]) -> None:
    """Name the first image of more than 8 bits a channel, if there is one: anomalib would clip it, mostly to white.

    Raises:
        ValueError: If there is one.
    """
    paths = {path for dataset in datasets for path in image_paths(dataset, masks=False)}
    deep: dict[str, str] = {}
    for path in sorted(paths):
        if Path(path).suffix.lower() not in NOT_IMAGES and flaw(path, decode=False) is None:
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    deep[path] = image.mode
    if deep:
        msg = (
            f"{named(list(deep))} has more than 8 bits a pixel (mode {next(iter(deep.values()))}), which anomalib "
            "clips: convert the images for training and for prediction to 8 bits, all by the same factor."
        )
        raise ValueError(msg)


class ImageCheck(Callback):
    """Look at every image file's header before training; after a failure, find the files that do not decode."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the headers of all sets before training, so that a broken test image is not found an hour later.

        Raises:
            ValueError: If the training set is empty, or a file is not an image, or has more than 8 bits a channel.
        """
        del pl_module
        if stage != "fit":
            return
        train_data = getattr(getattr(trainer, "datamodule", None), "train_data", None)
        if train_data is not None and len(train_data) == 0:
            msg = "The training set holds no normal images: check the folders that the data module was given."
            raise ValueError(msg)
        self._raise_for_unreadable(trainer, decode=False)
        raise_for_deep(self._datasets(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse images of more than 8 bits a channel: clipped, they would all look alike, and pass as normal.

        Raises:
            ValueError: If there is one.
        """
        del pl_module
        raise_for_deep(self._datasets(trainer))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse images of more than 8 bits a channel, as before a test."""
        self.on_test_start(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the broken files when reading one has failed, or say what is wrong with the data module's folders.

        Raises:
            ValueError: If a file does not decode, or the data module cannot be set up (:func:`explained`).
        """
        del pl_module
        sentence = explained(exception, getattr(trainer, "datamodule", None))
        if sentence:
            raise ValueError(sentence) from exception
        if isinstance(exception, OSError | SyntaxError | Image.DecompressionBombError):
            self._raise_for_unreadable(trainer, decode=True, cause=exception)

    def _raise_for_unreadable(self, trainer: Trainer, decode: bool, cause: BaseException | None = None) -> None:
        raise_for_unreadable(self._datasets(trainer), decode, cause)

    @staticmethod
    def _datasets(trainer: Trainer) -> Iterator[Any]:
        # All sets of a fit; of a later run, which may be given loaders, what it shows.
        run = trainer.state.fn or TrainerFn.FITTING
        datamodule = getattr(trainer, "datamodule", None) if run == TrainerFn.FITTING else None
        for name in ("train_data", "val_data", "test_data"):
            if hasattr(datamodule, name):
                yield getattr(datamodule, name)
        for name in LOADERS[run]:
            yield from datasets_of(getattr(trainer, name, None))
