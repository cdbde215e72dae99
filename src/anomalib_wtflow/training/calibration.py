"""Which normal images the threshold comes from, and when it is set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from anomalib.data.utils import LabelName
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from anomalib_wtflow.features.cache import FeatureDataset
from anomalib_wtflow.post_processor import WTFlowPostProcessor, images_needed
from anomalib_wtflow.torch_model import NormalisedFeatures
from anomalib_wtflow.training.feature_caching import FeatureCaching, products_of_images
from anomalib_wtflow.training.giving_back import GivesBack
from anomalib_wtflow.training.image_check import raise_for_unreadable

NO_NORMALS = (
    "There are no normal images for the threshold: give at least 2 normal training images, or a validation set with "
    "normal images, or ask for anomalib's F1 threshold with false_alarm_rate=None (null in a config)."
)
NO_DEFECTS = (
    "false_alarm_rate=None asks for anomalib's F1 threshold, which needs defective validation images, and there are "
    "none: give some, or a rate such as 0.05, which needs good ones only."
)
SLICE_SEED = 0
"""Of the slice of the training set, so that trainings with different seeds see the same images."""


class Calibration(GivesBack):
    """Set the post-processor's thresholds from normal images that the field is not trained on.

    These are the normal images of the validation set, if none of them is also in the test set; else a seeded slice of
    the training set. The thresholds are set before each checkpoint is written, and for the final weights.

    Args:
        post_processor: Takes the thresholds.
        ratio: Share of the training images in the slice.
        caching: Extracts features.
    """

    def __init__(self, post_processor: WTFlowPostProcessor, ratio: float, caching: FeatureCaching) -> None:
        self.post_processor, self.ratio, self.caching = post_processor, ratio, caching
        self.data: Any = None
        self._in_validation: list[int] | None = None
        self._cached: tuple[FeatureDataset, list[int]] | None = None
        self._names: list[str] = []
        self._counts: list[int] = []
        self._full_train_data: Any = None
        self._calibrated_at = -1

    # Choosing --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the normal images for the threshold before the training data is loaded.

        Raises:
            ValueError: If there are none; or, for anomalib's F1 threshold, no defective validation images.
        """
        del pl_module
        datamodule = getattr(trainer, "datamodule", None)
        if stage != "fit" or datamodule is None:
            return
        validation = getattr(datamodule, "val_data", None)
        if self.post_processor.false_alarm_rate is None:
            samples = getattr(validation, "samples", None)
            if samples is not None and not (samples["label_index"] == LabelName.ABNORMAL).any():
                raise ValueError(NO_DEFECTS)
            return
        chosen = choose(datamodule, self.ratio)
        self.data, self._in_validation = chosen.data, chosen.in_validation
        if chosen.kept is not None:
            self._full_train_data = datamodule.train_data
            datamodule.train_data = datamodule.train_data.subsample(chosen.kept)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a data module, take the normal images of the validation loader that the user gave.

        Raises:
            ValueError: If there are none.
        """
        del pl_module
        if self.post_processor.false_alarm_rate is None or getattr(trainer, "datamodule", None) is not None:
            return
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, list) and loaders else loaders
        data: Any = getattr(loader, "dataset", None)
        self._in_validation = normals(data, [getattr(trainer.train_dataloader, "dataset", None)])
        if not self._in_validation:
            raise ValueError(NO_NORMALS)
        self.data = data.subsample(self._in_validation)

    def give_back(self, trainer: Trainer) -> None:
        """Give the slice back."""
        if self._full_train_data is not None:
            trainer.datamodule.train_data = self._full_train_data  # type: ignore[attr-defined]
        self._full_train_data = self._cached = None

    # Scoring ---------------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds, before the checkpoint is written; a later validation run leaves them alone."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.calibrate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds where no validation has, before a checkpoint of the epoch is written."""
        self.calibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds for the final weights, if they are younger than the last ones, and report them."""
        self.calibrate(trainer, pl_module)
        if self.data is not None:
            self._report()

    def calibrate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds for the present weights; once a step."""
        if self.data is None or self._calibrated_at == trainer.global_step:
            return
        names: list[str] = pl_module.product_names  # type: ignore[assignment]
        scores, peaks, product = self._score(trainer, pl_module)
        self._counts = torch.bincount(product, minlength=len(names)).tolist()
        if 0 in self._counts:
            msg = (
                f"No normal image for the threshold is recognised as '{names[self._counts.index(0)]}': give it more "
                "good images, or check that its images are not those of another product."
            )
            raise ValueError(msg)
        self.post_processor.calibrate(scores, peaks, product, len(names))
        self._calibrated_at, self._names = trainer.global_step, names

    @torch.no_grad()
    def _score(self, trainer: Trainer, model: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image scores (infinite if like no product), the maps' largest pixels, and the products."""
        if self._cached is None:
            self._cached = self._extract(trainer, model)
        dataset, indices = self._cached
        scores, peaks, products = [], [], []
        for part in torch.tensor(indices).split(32):  # the rows may lie on the disk, too many for the memory
            features = NormalisedFeatures(dataset.store.rows[part], *dataset.recognition(part))  # type: ignore[union-attr, index]
            outputs = model.score_features(features, dataset.image_size)
            scores.append(outputs.pred_score.float().cpu().masked_fill(features.strangeness > 1, torch.inf))
            peaks.append(outputs.anomaly_map.flatten(1).amax(dim=1).float().cpu())
            products.append(features.product)
        return torch.cat(scores), torch.cat(peaks), torch.cat(products)

    def _extract(self, trainer: Trainer, model: Any) -> tuple[FeatureDataset, list[int]]:
        """Return a data set of features, and which of them are the threshold's."""
        dataset: Any = getattr(getattr(trainer, "datamodule", None), "val_data", None)
        if self._in_validation is not None and isinstance(dataset, FeatureDataset) and dataset.store is not None:
            return dataset, self._in_validation
        dataset = self.caching.extract(trainer, model, self.data, "calibration")
        return dataset, list(range(len(dataset)))

    def _report(self) -> None:
        """Tell the user what the thresholds promise, and warn if that is less than was asked for."""
        post, few = self.post_processor, []
        asked = post.false_alarm_rate
        assert asked is not None
        for place, (name, n) in enumerate(zip(self._names, self._counts, strict=True)):
            given = float(post.effective_false_alarm_rate[place])
            of = f" of '{name}'" if len(self._names) > 1 else ""
            promise = (
                f"image_sensitivity {post.image_sensitivity:g} calls some below it anomalous, so no rate is promised"
                if post.promised_false_alarm_rate[place].isnan()
                else f"a good image is called anomalous with a probability of at most {given:.2%}"
            )
            rank_zero_info(
                f"Threshold{of} {float(post.image_threshold[place]):.4g} from {n} normal images that were not trained "
                f"on: {promise}."
            )
            if given > asked * (1 + 1e-6):  # the buffer is float32
                few.append((of, n, given))
        if few:
            counts = "; ".join(
                f"there are {n}{of}: the threshold guarantees {given:.4f} instead" for of, n, given in few
            )
            rank_zero_warn(
                f"false_alarm_rate={asked} needs at least {images_needed(asked)} normal images for the "
                f"threshold and {counts}; give more good images to have the rate that you asked for."
            )


class Chosen(NamedTuple):
    """The normal images for the threshold, as an anomalib data set, and where they are.

    ``in_validation`` are their places in the validation set, if they are of it; else ``kept`` are the places of the
    training images that are left to train on.
    """

    data: Any
    in_validation: list[int] | None
    kept: list[int] | None


def choose(datamodule: Any, ratio: float) -> Chosen:
    """Choose the normal images for the threshold of a data module that is set up for ``fit``.

    Raises:
        ValueError: If there are none.
    """
    train, validation, test = (getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test"))
    places, data = normals(validation, [train, test]), validation
    if places and data is not None:
        data = data.subsample(places)
        if set(products_of_images(train) or ()) <= set(products_of_images(data) or ()):
            return Chosen(data, places, None)
    if train is None or not hasattr(train, "subsample"):
        raise ValueError(NO_NORMALS)
    held, kept = held_out(train, ratio)
    data = train.subsample(held)
    data.augmentations = getattr(test, "augmentations", train.augmentations)
    return Chosen(data, None, kept)


def normals(data: Any, others: Sequence[Any]) -> list[int]:
    """Find the normal images of an anomalib data set; none if one of them is in another set, too."""
    samples = getattr(data, "samples", None)
    if samples is None:
        return []
    places = (samples["label_index"] == LabelName.NORMAL).to_numpy().nonzero()[0].tolist()
    paths = {samples["image_path"][index] for index in places}
    shared = any(paths & set(other.samples["image_path"]) for other in others if hasattr(other, "samples"))
    return [] if shared else places


def held_out(data: Any, ratio: float) -> tuple[list[int], list[int]]:
    """Choose a seeded share of the images of each product, at least one, and return these and the others.

    Raises:
        ValueError: If none would be left of a product.
    """
    names = products_of_images(data) or [""] * len(data)
    held: list[int] = []
    for name in sorted(set(names)) or [""]:
        own = [index for index, each in enumerate(names) if each == name]
        count = max(1, round(ratio * len(own)))
        if count >= len(own):
            msg = (
                f"The product '{name}' has {len(own)} normal training images: give it at least 2, one to train on and "
                "one for the threshold, and some hundred for a low false-alarm rate."
            )
            raise ValueError(msg if name else NO_NORMALS)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(SLICE_SEED)).tolist()
        held += [own[k] for k in order[:count]]
    return sorted(held), sorted(set(range(len(data))) - set(held))


class Scores(NamedTuple):
    """Of n images, ``(n,)`` each: raw scores (infinite if like no product), the maps' largest pixels, and products."""

    scores: Tensor
    peaks: Tensor
    product: Tensor


@torch.no_grad()
def score_images(model: Any, data: Any, batch_size: int = 8) -> Scores:
    """Score images as the thresholds need it.

    Raises:
        ValueError: If an image cannot be read, or what becomes of it is NaN or infinite.
    """
    parts: list[tuple[Tensor, ...]] = []
    transform: Any = getattr(model.pre_processor, "transform", None) or torch.nn.Identity()
    try:
        for start in range(0, len(data), batch_size):
            items = [data[index] for index in range(start, min(start + batch_size, len(data)))]
            images = torch.stack([transform(item.image) for item in items]).to(model.device)
            outputs: Any = model.model(images)
            model.raise_for_broken(outputs, images, [item.image_path for item in items])
            scores = outputs.pred_score.float().masked_fill(outputs.strangeness > 1, torch.inf)
            parts.append((scores, outputs.anomaly_map.float().flatten(1).amax(dim=1), outputs.product))
    except (OSError, SyntaxError, ValueError) as error:
        raise_for_unreadable([data], decode=True, cause=error)
        raise
    return Scores(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))
