"""One pass of the images through the backbone, and features in their place from then on."""

import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from shutil import rmtree
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, WeightedRandomSampler

from anomalib_wtflow.features.cache import FeatureDataset, FeatureStore, Share, is_deterministic, temporary_folder
from anomalib_wtflow.flow.finite import broken
from anomalib_wtflow.flow.rows import Reduce
from anomalib_wtflow.post_processor import image_name
from anomalib_wtflow.products import places
from anomalib_wtflow.torch_model import NormalisedFeatures
from anomalib_wtflow.training.giving_back import GivesBack

REFERENCE_IMAGES, FEWEST, MOST = 96, 24, 768
"""Training images of each product that the contrast and the end of the training are told from: 96, or fewer, at least
24, so that they are at most 768 in all."""
SPLITS = ("train_data", "val_data")
KNOWN_SAMPLERS = (RandomSampler, SequentialSampler, DistributedSampler, WeightedRandomSampler)
"""Samplers that may show any image."""


class FeatureCaching(GivesBack):
    """Fit the normalisation in one pass over the training images, and have the epochs work on features.

    In ``setup`` data sets of features take the place of the data module's images, and no worker is asked for, so that
    Lightning builds its loaders, also distributed ones, from features. ``on_fit_start`` fills them, once a checkpoint
    to resume from has been restored. The images come back in ``teardown``. The processes of a machine share
    memory-mapped files, of which each fills a part: each image passes the backbone once in all of them.

    Images are not replaced where they are augmented at random, pre-processed by transforms that are not known to be
    deterministic, collated by a function of the user's, or come from loaders without a data module.

    Args:
        budget: GiB of memory for the features of one data set; 0 for no replacing.
    """

    reference: NormalisedFeatures
    """Normalised features of some training images of each product, of this process's part of them."""
    image_size: tuple[int, int] = (0, 0)
    """Height and width of the images, as the model sees them."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._given: dict[str, Any] = {}
        self._datasets: list[FeatureDataset] = []
        self._share = Share()
        self._stores = 0

    # Swapping --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Put data sets of features, empty as yet, in the place of the images."""
        if stage != "fit":
            return
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # the backbone is frozen
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule is not None and trainer.ckpt_path is None:
            pl_module.set_products(products_of(datamodule.train_data, name_of(datamodule)))
        if not self._can_cache(datamodule, "train_data", pl_module):
            torch.manual_seed(pl_module.settings.seed)  # loaders then draw from torch's own generator
            return
        warnings.filterwarnings("ignore", message="The '(train|val)_dataloader' does not have many workers")
        self._given = {"num_workers": datamodule.num_workers}
        datamodule.num_workers = 0
        for name in SPLITS:
            if self._can_cache(datamodule, name, pl_module):
                self._given[name] = getattr(datamodule, name)
                dataset = FeatureDataset(self._given[name], truth=name == "val_data")
                self._datasets.append(dataset)
                setattr(datamodule, name, dataset)

    def _can_cache(self, datamodule: Any, name: str, model: Any) -> bool:
        """Whether a data module would show the backbone the same images in each epoch."""
        data = getattr(datamodule, name, None)
        pre_processor = model.pre_processor
        return (
            self.budget > 0
            and isinstance(datamodule, AnomalibDataModule)
            and datamodule.external_collate_fn is None
            and isinstance(data, AnomalibDataset)
            and is_deterministic(data.augmentations)
            and (pre_processor is None or isinstance(pre_processor, PreProcessor))
            and is_deterministic(getattr(pre_processor, "transform", None))
        )

    def give_back(self, trainer: Trainer) -> None:
        """Give the images and the workers back, and remove shared files."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        for dataset in self._datasets:  # the trainer keeps its loaders, and they these
            dataset.store = dataset.recognised = dataset.masks = None
        self._datasets = []
        for name, value in self._given.items():
            # Images that another callback has put back already are more than those that were given here.
            if name not in SPLITS or isinstance(getattr(datamodule, name), FeatureDataset):
                setattr(datamodule, name, value)
        self._given = {}
        if self._share.folder is not None and trainer.local_rank == 0:
            rmtree(self._share.folder, ignore_errors=True)
        self._share = Share()

    # Extraction ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Pass the images through the backbone, fit the normalisation, and fill the data sets of features.

        Raises:
            ValueError: If the training set is empty, or a feature is not finite.
        """
        if trainer.num_devices > 1:
            name = trainer.strategy.broadcast(f"wtflow-features-{uuid.uuid4().hex}")
            folder = temporary_folder() / f"{name}-{trainer.node_rank}"  # nodes may share the folder
            folder.mkdir(mode=0o700, exist_ok=True)
            self._share = Share(folder, trainer.local_rank, trainer.num_devices)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if "train_data" in self._given:
            self._pass_training_images(trainer, pl_module, self._given["train_data"].collate_fn, datamodule.train_data)
        if "val_data" in self._given and trainer.limit_val_batches:
            self._fill(trainer, pl_module, datamodule.val_data)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Fit the normalisation where the epochs work on images.

        Raises:
            ValueError: If the training set is empty, or a feature is not finite.
        """
        if "train_data" not in self._given:
            loader: Any = trainer.train_dataloader
            known = isinstance(loader.sampler, KNOWN_SAMPLERS)
            shown = None if known else sorted(set(loader.sampler))
            self._pass_training_images(trainer, pl_module, loader.collate_fn, loader.dataset, shown)

    def _pass_training_images(
        self, trainer: Trainer, model: Any, collate_fn: Any, dataset: Any, shown: list[int] | None = None
    ) -> None:
        """Fit the normalisation, take the reference, and fill the data set if it is one of features.

        Args:
            trainer: The trainer.
            model: The model.
            collate_fn: Makes batches of images.
            dataset: Images, or an empty data set of features.
            shown: Which of the images a loader's own sampler shows; None for all.
        """
        model.raise_for_broken_weights()
        network, cached = model.model, isinstance(dataset, FeatureDataset)
        images = dataset.data if cached else dataset
        to_fit = not network.fitted or trainer.ckpt_path is None
        shown = list(range(len(images))) if shown is None else shown
        product = self._places(model, images)
        chosen = references(shown, product)
        indices = [
            index for index in (shown[k] for k in self._share.part(len(shown))) if cached or to_fit or index in chosen
        ]
        store = self._store(len(shown)) if cached else None
        if to_fit:
            network.reset()
        reference, position = FeatureStore(sum(index in chosen for index in indices), torch.inf), 0
        for features, batch in self._extract(trainer, model, images, indices, "training", collate_fn):
            here = indices[position : position + len(features)]
            position += len(features)
            self.image_size = tuple(batch.image.shape[-2:])  # type: ignore[union-attr]
            if to_fit:
                network.update(features, product[here])
            if store is not None:
                if store.rows is None:
                    store.open((store.count, *features.shape[1:]))
                    self._say_size(trainer, features, store)
                store.append(features)
            reference.append(features[[k for k, index in enumerate(here) if index in chosen]])
        if to_fit:
            model.model.finalize(over_processes(trainer, model))
        self.reference = self._normalise(model, reference.features)
        if store is not None:
            self._agree(trainer, store)
            recognised = self._recognise(model, store)
            self._agree(trainer, recognised)
            dataset.store, dataset.recognised, dataset.image_size = store, recognised, self.image_size

    def _say_size(self, trainer: Trainer, features: Tensor, store: FeatureStore) -> None:
        """Say how large the cache will be, as soon as the first images have shown the size of their features."""
        counts = [len(data) for data in self._datasets if not data.truth or trainer.limit_val_batches]
        size = features[0].numel() * torch.float32.itemsize
        place = "of memory" if store.in_memory else f"in temporary files in {temporary_folder()}"
        shape = " x ".join(map(str, features.shape[1:]))
        rank_zero_info(
            f"The feature cache takes {text_of(sum(counts) * size)} {place}: {sum(counts)} training and validation "
            f"images, {shape} numbers ({text_of(size)}) each."
        )

    @staticmethod
    def _places(model: Any, images: Any) -> Tensor:
        """Return the place of each image's product among the model's, ``(len(images),)``."""
        names = products_of_images(images)
        return torch.zeros(len(images), dtype=torch.int64) if names is None else places(names, model.product_names)

    @staticmethod
    def _normalise(model: Any, features: Tensor) -> NormalisedFeatures:
        """Normalise features that are kept in memory, a few images at a time."""
        if not len(features):
            return NormalisedFeatures(features, torch.empty(0, dtype=torch.int64), torch.empty(0))
        parts = [model.model.normalise(part.to(model.device)) for part in features.split(32)]
        return NormalisedFeatures(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))

    def _recognise(self, model: Any, store: FeatureStore) -> FeatureStore:
        """Normalise a store's own part in place, and return what was recognised."""
        recognised = self._store(store.count)
        for part in store.features.split(16):
            x0, product, strangeness = self._normalise(model, part)
            part.copy_(x0)
            recognised.append(torch.stack([product.float(), strangeness], dim=1))
        return recognised

    def extract(self, trainer: Trainer, model: Any, data: Any, kind: str) -> FeatureDataset:
        """Return the normalised features of an anomalib data set, which the processes of a machine share."""
        dataset = FeatureDataset(data)
        self._fill(trainer, model, dataset, kind)
        return dataset

    def _fill(self, trainer: Trainer, model: Any, dataset: FeatureDataset, kind: str = "validation") -> None:
        """Pass a data set's images through the backbone, and put their normalised features into it."""
        data = dataset.data
        dataset.store = store = self._store(len(data))
        known = getattr(data, "with_mask", None)  # of each image, where some have masks and others none
        with_masks = dataset.truth and any(data.samples.get("mask_path", "") != "") and (known is None or known.all())
        masks = self._store(len(data), torch.bool) if with_masks else None
        for features, batch in self._extract(trainer, model, data, store.part, kind, data.collate_fn):
            store.append(features)
            self.image_size = tuple(batch.image.shape[-2:])  # type: ignore[union-attr]
            if masks is not None:
                masks.append(batch.gt_mask.bool().cpu())  # type: ignore[union-attr]
        recognised = self._recognise(model, store)
        self._agree(trainer, store, recognised, masks)
        dataset.recognised, dataset.masks, dataset.image_size = recognised, masks, self.image_size

    def _store(self, count: int, dtype: torch.dtype = torch.float32) -> FeatureStore:
        self._stores += 1
        return FeatureStore(count, self.budget * 2**30, self._share, f"features-{self._stores}", dtype)

    def _agree(self, trainer: Trainer, *stores: FeatureStore | None) -> None:
        """Wait for the other processes, and open stores of which this process had no part."""
        self.image_size = trainer.strategy.broadcast(self.image_size)
        for store in stores:
            if store is not None:
                shape = trainer.strategy.broadcast(None if store.rows is None else tuple(store.rows.shape))
                if store.rows is None and shape is not None:
                    store.open(shape)
        trainer.strategy.barrier("features")
        for store in stores:
            if store is not None and trainer.local_rank == 0:
                store.unlink()

    @torch.no_grad()
    def _extract(
        self, trainer: Trainer, model: Any, data: Any, indices: Sequence[int], kind: str, collate_fn: Any
    ) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the backbone's features of some images, and the pre-processed batches that they come from."""
        datamodule = getattr(trainer, "datamodule", None)
        workers = self._given.get("num_workers", getattr(datamodule, "num_workers", 0))
        loader: Any = DataLoader(
            data,
            batch_size=getattr(datamodule, "eval_batch_size", 32),
            sampler=indices,
            num_workers=min(workers, (os.cpu_count() or 1) - 1),  # more of them only take the backbone's cores
            collate_fn=collate_fn,
        )
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        title = f"Extracting the {kind} images' features"
        for index, batch in enumerate(track(loader, description=title, transient=True, disable=not shown)):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            if isinstance(model.pre_processor, PreProcessor):
                model.pre_processor.on_validation_batch_start(trainer, model, batch, index)
            with trainer.precision_plugin.val_step_context():
                features = model.model.extract(batch.image)
            raise_for_broken_features(features, batch)
            yield features.float(), batch


def raise_for_broken_features(features: Tensor, batch: Any) -> None:
    """Name the first image of a batch whose features are NaN or infinite.

    Raises:
        ValueError: If there is one.
    """
    places = broken(features)
    if places:
        what = "pixels" if places[0] in broken(batch.image) else "features"
        msg = (
            f"The {what} of {image_name(batch.image_path, places[0])} are NaN or infinite: check the weights file and "
            "the image."
        )
        raise ValueError(msg)


def text_of(size: float) -> str:
    """Write a number of bytes in the largest unit that it has one of."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def name_of(datamodule: Any) -> str:
    """Return what a data module's images show, by its name, where they do not say it themselves."""
    return str(getattr(datamodule, "category", "") or getattr(datamodule, "name", type(datamodule).__name__))


def products_of_images(data: Any) -> list[str] | None:
    """Return the name of each image's product; None for images that do not know it."""
    samples = getattr(data, "samples", None)
    return None if samples is None or "product" not in samples else samples["product"].tolist()


def products_of(data: Any, otherwise: str) -> list[str]:
    """Return the names of the products in a data set, sorted; one name for images that do not know."""
    names = products_of_images(data)
    return [otherwise] if names is None else sorted(set(names))


def references(shown: Sequence[int], product: Tensor) -> set[int]:
    """Choose training images of each product, spread over them."""
    shown_products = product[list(shown)]
    kinds = shown_products.unique().tolist()
    most = max(FEWEST, min(REFERENCE_IMAGES, MOST // max(1, len(kinds))))
    chosen: set[int] = set()
    for kind in kinds:
        own = (shown_products == kind).nonzero().flatten()
        spread = torch.linspace(0, len(own) - 1, min(len(own), most)).long()
        chosen.update(shown[k] for k in own[spread].tolist())
    return chosen


def over_processes(trainer: Trainer, model: Any) -> Reduce:
    """Return what reduces a value over the processes of a training, on the model's device and back."""

    def reduce(value: Tensor, operation: str) -> Tensor:
        if trainer.world_size == 1:
            return value
        return trainer.strategy.reduce(value.to(model.device), reduce_op=operation).to(value.device)

    return reduce
