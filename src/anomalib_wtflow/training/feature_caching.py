"""One pass of the images through the backbone, and features in their place from then on."""

import os
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset, Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from anomalib_wtflow.features.cache import FeatureDataset, FeatureStore, Share, is_deterministic
from anomalib_wtflow.training.giving_back import GivesBack

REFERENCE_IMAGES = 96
"""Training images that the contrast and the end of the training are told from."""
SPLITS = ("train_data", "val_data")


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

    reference: Tensor
    """Normalised features of some training images, of this process's part of them."""
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
            dataset.store = dataset.masks = None
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
            folder = Path(tempfile.gettempdir()) / f"{name}-{trainer.node_rank}"  # nodes may share the folder
            folder.mkdir(exist_ok=True)
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
            known = isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler)
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
        normalization = model.model.normalization
        to_fit = normalization.needs_fit and not (trainer.ckpt_path is not None and normalization.fitted)
        places = range(len(dataset)) if shown is None else shown
        count = len(places)
        cached = isinstance(dataset, FeatureDataset)
        store = self._store(count) if cached else None
        chosen = {places[k] for k in torch.linspace(0, count - 1, min(count, REFERENCE_IMAGES)).long().tolist()}
        own = [places[k] for k in self._share.part(count)]
        indices = [index for index in own if cached or to_fit or index in chosen]
        if to_fit:
            normalization.reset()
        reference, position = [], 0
        images = dataset.data if cached else dataset
        for features, batch in self._extract(trainer, model, images, indices, "training", collate_fn):
            kept = [k for k in range(len(features)) if indices[position + k] in chosen]
            position += len(features)
            reference.append(features[kept].cpu())
            self.image_size = tuple(batch.image.shape[-2:])  # type: ignore[union-attr]
            if to_fit:
                normalization.update(features)
            if store is not None:
                store.append(features)
        if to_fit:
            self._finalize(trainer, model)

        def normalise(part: Tensor) -> Tensor:
            return normalization(part.to(model.device)).cpu()

        self.reference = normalise(torch.cat(reference)) if reference else torch.empty(0)
        if store is not None:
            self._agree(trainer, store)
            store.apply(normalise)
            trainer.strategy.barrier("normalised features")
            dataset.store, dataset.image_size = store, self.image_size

    @staticmethod
    def _finalize(trainer: Trainer, model: Any) -> None:
        if trainer.world_size == 1:
            model.model.fit_normalization()
            return
        reduce = trainer.strategy.reduce
        model.model.fit_normalization(lambda total: reduce(total.to(model.device), reduce_op="sum"))

    def extract(self, trainer: Trainer, model: Any, data: Any, kind: str) -> FeatureDataset:
        """Return the normalised features of an anomalib data set, which the processes of a machine share."""
        dataset = FeatureDataset(data)
        self._fill(trainer, model, dataset, kind)
        return dataset

    def _fill(self, trainer: Trainer, model: Any, dataset: FeatureDataset, kind: str = "validation") -> None:
        """Pass a data set's images through the backbone, and put their normalised features into it."""
        data = dataset.data
        dataset.store = store = self._store(len(data))
        with_masks = dataset.truth and any(data.samples.get("mask_path", "") != "")
        masks = self._store(len(data), torch.bool) if with_masks else None
        for features, batch in self._extract(trainer, model, data, store.part, kind, data.collate_fn):
            store.append(model.model.normalization(features).cpu())
            self.image_size = tuple(batch.image.shape[-2:])  # type: ignore[union-attr]
            if masks is not None:
                masks.append(batch.gt_mask.bool().cpu())  # type: ignore[union-attr]
        self._agree(trainer, store, masks)
        dataset.masks, dataset.image_size = masks, self.image_size

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
            yield features.float(), batch
