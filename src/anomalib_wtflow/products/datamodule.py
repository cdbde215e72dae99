"""Many products in one data module: a folder of folders, or several data modules."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from anomalib import TaskType
from anomalib.data import (
    AnomalibDataModule,
    AnomalibDataset,
    Folder,
    ImageBatch,
    ImageItem,
    NumpyImageBatch,
    NumpyImageItem,
    get_datamodule,
)
from anomalib.data.utils import LabelName
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from anomalib_wtflow._registration import register_datamodule
from anomalib_wtflow.data.layout import GOOD, has_images, mvtec_layout
from anomalib_wtflow.errors import WTFlowError

SETS = ("train_data", "val_data", "test_data")


@dataclass
class NumpyProductItem(NumpyImageItem):
    """:class:`ProductItem` with arrays."""

    product: str | None = None


@dataclass
class NumpyProductBatch(NumpyImageBatch):
    """:class:`ProductBatch` with arrays."""

    item_class: ClassVar[type[NumpyImageItem]] = NumpyProductItem
    product: list[str] | None = None


@dataclass
class ProductItem(ImageItem):
    """An image that knows its product."""

    numpy_class: ClassVar[type[NumpyImageItem]] = NumpyProductItem
    product: str | None = None


@dataclass
class ProductBatch(ImageBatch):
    """Images that know their products."""

    item_class: ClassVar[type[ImageItem]] = ProductItem
    numpy_class: ClassVar[type[NumpyImageBatch]] = NumpyProductBatch
    product: list[str] | None = None


class ProductsDataset(AnomalibDataset):
    """Images of several data sets, one for each product.

    Args:
        datasets: anomalib data sets of images, by product; empty ones are left out.
    """

    def __init__(self, datasets: Mapping[str, AnomalibDataset]) -> None:
        super().__init__()
        tables = [
            dataset.samples.assign(product=name, mask_path=dataset.samples.get("mask_path", ""))
            for name, dataset in datasets.items()
            if len(dataset)
        ]
        columns = ["image_path", "split", "label", "label_index", "mask_path", "product"]
        samples = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
        samples["mask_path"] = samples["mask_path"].fillna("")
        self.samples = samples
        self.masked = frozenset(samples.loc[samples["mask_path"] != "", "product"])
        self.samples.attrs["task"] = TaskType.SEGMENTATION if self.with_mask.any() else TaskType.CLASSIFICATION

    @property
    def with_mask(self) -> "pd.Series[bool]":
        """Tell whether each image has a mask: good images of products with masks have an empty one."""
        samples = self.samples
        known = (samples["mask_path"] != "") | (samples["label_index"] == LabelName.NORMAL)
        return samples["product"].isin(self.masked) & known

    def __getitem__(self, index: int) -> ProductItem:
        """Return an image, its mask if there is one, and its product."""
        row, task = self.samples.iloc[index], self.samples.attrs["task"]
        try:
            if row["product"] not in self.masked or (not row["mask_path"] and row["label_index"] != LabelName.NORMAL):
                self.samples.attrs["task"] = TaskType.CLASSIFICATION
            item = super().__getitem__(index)
        finally:
            self.samples.attrs["task"] = task
        fields = {name: getattr(item, name) for name in ("image", "gt_mask", "gt_label", "image_path", "mask_path")}
        return ProductItem(**fields, product=row["product"])

    @property
    def collate_fn(self) -> Callable:
        """Make batches that know their products."""
        return collate


@register_datamodule
class Products(AnomalibDataModule):
    """All products of a plant, for one model.

    Each sub-folder of ``root`` is a product: in MVTec's layout (``train/good``, ``test/<kind>``,
    ``ground_truth/<kind>``), or a folder of good images alone, of which a fifth is set aside to test on. ``members``
    adds any of anomalib's data modules. Images know their product (``batch.product``); a model does not need this.

    Args:
        root: Folder of the products' folders.
        products: Which of them; None for all.
        members: Further products by name: anomalib data modules, their names, or ``class_path`` and ``init_args``.
        name: Name of the whole, which the results' folder has; None for that of the folder.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Loader processes.
        seed: Seed of the split of folders of good images alone.

    Raises:
        WTFlowError: If there are no products, one has no good training images, or a name is given twice; the message
            names the product and the folder.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        products: list[str] | None = None,
        members: dict[str, Any] | None = None,
        name: str | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(train_batch_size, eval_batch_size, num_workers, seed=seed)
        self.members = {} if root is None else self._folders(Path(root), products)
        for product, member in (members or {}).items():
            if product in self.members:
                msg = f"The product '{product}' is given twice: give each product its own name."
                raise WTFlowError(msg)
            self.members[product] = datamodule_of(member)
        if not self.members:
            msg = "There are no products: give the folder of their folders (--data.root), or members."
            raise WTFlowError(msg)
        self._name = name or (Path("Products") if root is None else Path(root).absolute()).name

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the whole; below a folder of this name, pictures lie as images do."""
        return self._name

    def _folders(self, root: Path, products: Sequence[str] | None) -> dict[str, AnomalibDataModule]:
        found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        missing = [name for name in products or [] if name not in found]
        if missing or not found:
            msg = (
                f"There is no product folder '{root / (missing or ['*'])[0]}': '{root}' has {', '.join(found) or None}."
            )
            raise WTFlowError(msg)
        return {name: self._folder(root / name) for name in (found if products is None else products)}

    def _folder(self, path: Path) -> AnomalibDataModule:
        if (path / GOOD).is_dir():
            return mvtec_layout(path, val_split_mode="none", seed=self.seed)
        inside = [child.name for child in path.iterdir() if child.is_dir() and has_images(child)]
        if inside or not has_images(path):
            what = f"has folders ({inside[0]}) but no '{GOOD}'" if inside else "holds no images"
            msg = f"The product folder '{path}' {what}: put good images into it, or into '{path / GOOD}'."
            raise WTFlowError(msg)
        return Folder(name=path.name, root=path, normal_dir=".", val_split_mode="none", seed=self.seed)

    # Data ------------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the data of each member."""
        for member in self.members.values():
            member.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Put the members' sets together, each split as the member splits it."""
        if not self._is_setup:
            self._setup(stage)
            self._is_setup = True
        self._update_augmentations()

    def _setup(self, _stage: str | None = None) -> None:
        for name, member in self.members.items():
            member.setup()
            if not len(getattr(member, "train_data", ())):
                msg = f"The product '{name}' has no training images: give it good ones, or leave it out."
                raise WTFlowError(msg)
            if member.train_data.collate_fn != ImageBatch.collate:
                msg = f"The product '{name}' is of {type(member).__name__}, which gives no plain images: leave it out."
                raise WTFlowError(msg)
        for each in ("train_data", "val_data", "test_data"):
            sets = {name: getattr(member, each) for name, member in self.members.items() if hasattr(member, each)}
            setattr(self, each, ProductsDataset(sets))
        if not len(self.val_data):
            self.val_data = copy.deepcopy(self.test_data)

    def val_dataloader(self) -> DataLoader:
        """Return the validation images, batched as those of the test."""
        return self._evaluated(self.val_data) or super().val_dataloader()

    def test_dataloader(self) -> DataLoader:
        """Return the test images; no batch mixes images with and without masks."""
        return self._evaluated(self.test_data) or super().test_dataloader()

    def _evaluated(self, data: Any) -> DataLoader | None:
        if not isinstance(data, ProductsDataset) or data.with_mask.nunique() < 2:
            return None
        return DataLoader(
            data,
            batch_sampler=OneKind(SequentialSampler(data), self.eval_batch_size, drop_last=False, kinds=data.with_mask),
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or data.collate_fn,
        )


class OneKind(BatchSampler):
    """Batches of what a sampler gives, none of two kinds.

    Args:
        sampler: Gives indices.
        batch_size: Most items of a batch.
        drop_last: As in torch; nothing is dropped here.
        kinds: The kind of each item, by index.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, kinds: Sequence[bool]) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.kinds = list(kinds)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches."""
        indices = list(self.sampler)
        for kind in sorted({self.kinds[index] for index in indices}):
            own = [index for index in indices if self.kinds[index] == kind]
            yield from (own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size))

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(1 for _ in self)


def collate(items: list[ImageItem]) -> ProductBatch:
    """Make a batch; it has no masks if one image has none."""
    if any(item.gt_mask is None for item in items):
        for item in items:
            item.gt_mask = None
    return ProductBatch.collate(items)  # type: ignore[return-value]


def datamodule_of(member: Any) -> AnomalibDataModule:
    """Build the data module of a product from its name, or ``class_path`` and ``init_args``."""
    if isinstance(member, AnomalibDataModule):
        return member
    return get_datamodule({"class_path": member} if isinstance(member, str) else member)
