"""Many products in one data module: a folder of folders, or any of anomalib's data modules side by side."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import (
    AnomalibDataModule,
    AnomalibDataset,
    ImageBatch,
    ImageItem,
    NumpyImageBatch,
    NumpyImageItem,
    get_datamodule,
)
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import LabelName
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, WeightedRandomSampler

from anomalib_wtflow._registration import register_datamodule
from anomalib_wtflow.cli.errors import one_sentence
from anomalib_wtflow.data.layout import GOOD, AnyFolder, has_images, mvtec_layout

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
        roots: Folders of products whose images are named as below them, whatever links lead there.
    """

    def __init__(self, datasets: Mapping[str, AnomalibDataset], roots: Mapping[str, Path] | None = None) -> None:
        super().__init__()
        tables = [
            dataset.samples.assign(product=name, mask_path=dataset.samples.get("mask_path", ""))
            for name, dataset in datasets.items()
            if len(dataset)
        ]
        columns = ["image_path", "split", "label", "label_index", "mask_path", "product"]
        samples = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
        samples["mask_path"] = samples["mask_path"].fillna("")
        for name, root in (roots or {}).items():
            given = samples["product"] == name
            samples.loc[given, "image_path"] = [
                str(root / Path(path).relative_to(root.resolve()))
                if Path(path).is_relative_to(root.resolve())
                else path
                for path in samples.loc[given, "image_path"]
            ]
        self.samples = samples
        self.masked = frozenset(samples.loc[samples["mask_path"] != "", "product"])
        self.samples.attrs["task"] = TaskType.SEGMENTATION if self.with_mask.any() else TaskType.CLASSIFICATION

    @property
    def with_mask(self) -> "pd.Series[bool]":
        """Whether it is known of each image where it is defective: of good ones of products that have masks, too."""
        samples = self.samples
        told = (samples["mask_path"] != "") | (samples["label_index"] == LabelName.NORMAL)
        return samples["product"].isin(self.masked) & told

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
    adds any of anomalib's data modules. Images know their product (``batch.product``); a model need not be told it.

    Args:
        root: Folder of the products' folders.
        products: Which of them; None for all.
        members: Further products by name: anomalib data modules, their names, or ``class_path`` and ``init_args``.
        balance: How often a product is trained on: 0 in proportion to its images, 1 all products alike often, 0.5 in
            proportion to the square root.
        name: Name of the whole, of which the results' folder is called; None for that of the folder.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Loader processes.
        seed: Seed of the split of folders of good images alone, and of the balanced order.

    Raises:
        ValueError: If there are no products, one has no good training images, a name is given twice, or a number is
            out of range; the message names the product and the folder.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        products: list[str] | None = None,
        members: dict[str, Any] | None = None,
        balance: float = 0.0,
        name: str | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(train_batch_size, eval_batch_size, num_workers, seed=seed)
        with one_sentence():
            if not 0 <= balance <= 1:
                msg = f"balance is {balance}: choose a number from 0 (as many images) to 1 (all products alike)."
                raise ValueError(msg)
            self.balance = balance
            self.members = {
                **({} if root is None else self._folders(Path(root), products)),
                **self._modules(members or {}),
            }
            self._raise_for_twice(root, products, members)
            # Folder resolves links; pictures lie as images do below the folder that was given.
            self._roots = {} if root is None else {name: Path(root).absolute() / name for name in self.members}
            if not self.members:
                msg = "There are no products: give the folder of their folders (--data.root), or members."
                raise ValueError(msg)
        roots = [getattr(member, "root", None) for member in self.members.values()]
        folders = [whole(each) for each in roots if each is not None]
        common = Path(os.path.commonpath(folders)) if folders else Path("Products")
        self._whole = name or (common.name if root is None else Path(whole(root)).name) or "Products"

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the whole; below a folder of this name, pictures lie as images do."""
        return self._whole

    # Members ---------------------------------------------------------------------------------------------------------

    def _folders(self, root: Path, products: Sequence[str] | None) -> dict[str, AnomalibDataModule]:
        if not root.is_dir():
            msg = f"There is no folder '{root}': give the folder that holds a folder for each product."
            raise ValueError(msg)
        found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not found:
            msg = f"There are no folders in '{root}': give the folder that holds a folder for each product."
            raise ValueError(msg)
        missing = [name for name in products or [] if name not in found]
        if missing:
            msg = f"There is no product '{missing[0]}' in '{root}': choose from {', '.join(found)}."
            raise ValueError(msg)
        return {name: self._folder(root / name) for name in (found if products is None else products)}

    def _folder(self, path: Path) -> AnomalibDataModule:
        name, good = path.name, path / GOOD
        if good.is_dir():
            if not has_images(good):
                msg = f"The product '{name}' has no training images: put good images into '{good}'."
                raise ValueError(msg)
            return mvtec_layout(path, val_split_mode="none", seed=self.seed)
        inside = [child.name for child in path.iterdir() if child.is_dir() and has_images(child)]
        if inside or not has_images(path):
            what = f"has folders ({inside[0]}) but no 'train/good'" if inside else "holds no images"
            msg = (
                f"The product '{name}' cannot be read, since '{path}' {what}: put good images into it, or into "
                f"'{good}'."
            )
            raise ValueError(msg)
        return AnyFolder(name=name, root=path, normal_dir=".", val_split_mode="none", seed=self.seed)

    @staticmethod
    def _modules(members: Mapping[str, Any]) -> dict[str, AnomalibDataModule]:
        return {name: made_of(name, member) for name, member in members.items()}

    @staticmethod
    def _raise_for_twice(root: Any, products: Sequence[str] | None, members: Mapping[str, Any] | None) -> None:
        given = list(products or [])
        if root is not None and products is None:
            given = [path.name for path in Path(root).iterdir() if path.is_dir()]
        given += list(members or {})
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            msg = f"The product '{twice[0]}' is given twice: give each product one name of its own."
            raise ValueError(msg)

    # Data ------------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Have each member prepare its data."""
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
            try:
                member.setup()
            except (OSError, ValueError, RuntimeError, MisMatchError) as error:
                msg = f"The images of the product '{name}' cannot be found: {error}"
                raise ValueError(msg) from error
            if not len(getattr(member, "train_data", ())):
                msg = f"The product '{name}' has no training images: give it good ones, or leave it out."
                raise ValueError(msg)
            if member.train_data.collate_fn != ImageBatch.collate:
                msg = f"The product '{name}' is of {type(member).__name__}, which gives no plain images: leave it out."
                raise ValueError(msg)
        for each in SETS:
            sets = {name: getattr(member, each) for name, member in self.members.items() if hasattr(member, each)}
            setattr(self, each, ProductsDataset(sets, self._roots))
        if not len(self.val_data):
            self.val_data = copy.deepcopy(self.test_data)

    def train_dataloader(self) -> DataLoader:
        """Return the training images, products balanced as asked for."""
        products = self.train_data.samples["product"]
        if self.balance == 0 or products.nunique() == 1:
            return super().train_dataloader()
        weights = products.map(products.value_counts()).astype(float) ** -self.balance
        generator = torch.Generator().manual_seed(self.seed or 0)
        sampler = WeightedRandomSampler(weights.tolist(), len(products), generator=generator)
        return DataLoader(
            self.train_data,
            self.train_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )

    def val_dataloader(self) -> DataLoader:
        """Return the validation images, batched as those of the test."""
        return self._evaluated(self.val_data) or super().val_dataloader()

    def test_dataloader(self) -> DataLoader:
        """Return the test images; no batch mixes those whose masks are known with others, which would hide them."""
        return self._evaluated(self.test_data) or super().test_dataloader()

    def _evaluated(self, data: Any) -> DataLoader | None:
        """Return a loader of batches of one kind, if there are two."""
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
        for places in batches([self.kinds[index] for index in indices], self.batch_size):
            yield [indices[place] for place in places]

    def __len__(self) -> int:
        """Return the number of batches."""
        return sum(1 for _ in self)


def whole(path: str | Path) -> str:
    """Return an absolute path without `..`; links stay."""
    return os.path.normpath(Path(path).absolute())


def collate(items: list[ImageItem]) -> ProductBatch:
    """Make a batch; its masks are unknown if one is."""
    if any(item.gt_mask is None for item in items):
        for item in items:
            item.gt_mask = None
    return ProductBatch.collate(items)  # type: ignore[return-value]


def made_of(name: str, member: Any) -> AnomalibDataModule:
    """Build the data module of a product.

    Raises:
        ValueError: If it cannot be built.
    """
    if isinstance(member, AnomalibDataModule):
        return member
    try:
        return get_datamodule({"class_path": member} if isinstance(member, str) else member)
    except Exception as error:
        msg = (
            f"The product '{name}' cannot be made of {member!r}: give the name of an anomalib data module, or "
            f"class_path and init_args ({type(error).__name__}: {error})."
        )
        raise ValueError(msg) from error


def batches(kinds: Sequence[bool], size: int) -> Iterator[list[int]]:
    """Yield places of at most ``size`` items of one kind."""
    for kind in sorted(set(kinds)):
        chosen = [place for place, each in enumerate(kinds) if each == kind]
        yield from (chosen[start : start + size] for start in range(0, len(chosen), size))
