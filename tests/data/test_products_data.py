"""Many products in one data module."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from PIL import Image
from torch.utils.data import WeightedRandomSampler

from anomalib_wtflow import Products, SyntheticParts
from anomalib_wtflow.data.drawing import DEFECTS, draw_part, shape_of
from anomalib_wtflow.data.products import batches
from anomalib_wtflow.training.calibration import held_out

DRAWN = {"train_images": 6, "test_images": 4, "defect_images": 2, "side": 32}


def images(folder: Path, count: int, masks: bool = False) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        picture = np.full((8, 8), 255, np.uint8) if masks else np.full((8, 8, 3), 5 * index, np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")


@pytest.fixture
def plant(tmp_path: Path) -> Path:
    """A product with masks, one with defects but no masks, and one of good images alone."""
    root = tmp_path / "plant"
    for name, masks in (("bolt", True), ("nut", False)):
        images(root / name / "train" / "good", 5)
        images(root / name / "test" / "good", 2)
        for kind in ("bent", "rusty"):
            images(root / name / "test" / kind, 3)
            if masks:
                images(root / name / "ground_truth" / kind, 3, masks=True)
    images(root / "washer", 10)
    return root


def ready(module: Products) -> Products:
    module.prepare_data()
    module.setup()
    return module


def counted(data: object) -> dict[str, int]:
    return dict(Counter(data.samples["product"]))


def test_a_folder_of_folders(plant: Path) -> None:
    """A fifth of a folder of good images is set aside to test on; the test set validates."""
    module = ready(Products(plant))
    assert module.name == "plant"
    assert counted(module.train_data) == {"bolt": 5, "nut": 5, "washer": 8}
    assert counted(module.test_data) == counted(module.val_data) == {"bolt": 8, "nut": 8, "washer": 2}
    defective = module.test_data.samples[module.test_data.samples["label_index"] == 1]
    assert dict(Counter(defective["product"])) == {"bolt": 6, "nut": 6}
    assert counted(ready(Products(plant, products=["nut", "bolt"])).train_data) == {"nut": 5, "bolt": 5}


def test_items_and_batches_know_their_product(plant: Path) -> None:
    """Also as arrays; where it is known where a product is defective, good images have an empty mask."""
    module = ready(Products(plant, eval_batch_size=5))
    seen: Counter[str] = Counter()
    for batch in module.test_dataloader():
        assert len(batch.product) == len(batch.image)
        assert batch.to_numpy().product == batch.product
        assert [item.product for item in batch] == batch.product
        for item in batch:
            assert item.product in Path(item.image_path).parts
        seen.update(batch.product)
        assert (batch.gt_mask is not None) == (set(batch.product) == {"bolt"})
        if batch.gt_mask is not None:
            assert batch.gt_mask.flatten(1).any(1).tolist() == batch.gt_label.bool().tolist()
    assert seen == counted(module.test_data)
    item = module.train_data[0]
    assert item.product == "bolt"
    assert item.to_numpy().product == "bolt"


def test_batches_of_one_kind() -> None:
    kinds = [True, False, True, True, False, True]
    assert list(batches(kinds, 3)) == [[1, 4], [0, 2, 3], [5]]
    assert list(batches([True] * 2, 3)) == [[0, 1]]


def test_members(plant: Path, tmp_path: Path) -> None:
    """Any data modules, by name, as a class with arguments or as they are, beside folders."""
    flange = {"class_path": "SyntheticParts", "init_args": {"root": str(tmp_path / "drawn"), **DRAWN}}
    other = SyntheticParts(root=tmp_path / "drawn", product=1, **DRAWN)
    module = ready(Products(plant, products=["bolt"], members={"flange": flange, "other": other}))
    assert counted(module.train_data) == {"bolt": 5, "flange": 6, "other": 6}
    assert module.name == "plant"
    assert Products(members={"flange": flange, "other": other}).name == "drawn"
    assert Products(members={"flange": flange}, name="all").name == "all"


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_products_are_balanced(plant: Path, balance: float) -> None:
    """An image is drawn with a probability in proportion to ``1 / n^balance``."""
    images(plant / "pin", 50)
    module = ready(Products(plant, products=["bolt", "pin"], balance=balance, train_batch_size=1))
    loader = module.train_dataloader()
    assert len(loader) == 45
    products = module.train_data.samples["product"]
    if balance == 0:
        assert sorted(loader.sampler) == list(range(45))
        return
    assert isinstance(loader.sampler, WeightedRandomSampler)
    expected = np.array([5.0**-balance if name == "bolt" else 40.0**-balance for name in products])
    np.testing.assert_allclose(loader.sampler.weights.numpy(), expected)
    share = np.mean([products[index] == "bolt" for _ in range(100) for index in loader.sampler])
    assert share == pytest.approx(expected[products == "bolt"].sum() / expected.sum(), abs=0.03)


def test_links_are_named_as_they_were_given(plant: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "bolt").symlink_to(plant / "bolt")
    module = ready(Products(other))
    assert all(path.startswith(str(other / "bolt")) for path in module.test_data.samples["image_path"])
    assert module.test_data[0].image.shape == (3, 8, 8)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("break_it", "given", "message"),
    [
        (lambda plant: None, {"root": "nowhere"}, r"There is no folder 'nowhere'"),
        (emptied, {}, r"There are no folders in '.*plant'"),
        (lambda plant: emptied(plant / "nut/train/good"), {}, r"The product 'nut' has no training images: .*nut/train"),
        (lambda plant: shutil.rmtree(plant / "nut/train"), {}, r"The product 'nut' cannot be read, .*folders \(test"),
        (lambda plant: emptied(plant / "washer"), {}, r"The product 'washer' cannot be read, .* holds no images"),
        (
            lambda plant: (plant / "nut/test/good").rename(plant / "nut/test/Good"),
            {},
            r"'.*nut/test/Good' is named like 'good', and would be a kind of defect: rename it to 'good', or to what",
        ),
        (lambda plant: None, {"products": ["screw"]}, r"There is no product 'screw' in '.*': choose from bolt, nut"),
        (lambda plant: None, {"products": ["nut", "nut"]}, r"The product 'nut' is given twice"),
        (lambda plant: None, {"members": {"nut": "SyntheticParts"}}, r"The product 'nut' is given twice"),
        (lambda plant: None, {"members": {"x": "NoSuchData"}}, r"The product 'x' cannot be made of 'NoSuchData'"),
        (lambda plant: None, {"balance": 1.5}, r"balance is 1.5: choose a number from 0"),
        (lambda plant: None, {"root": None}, r"There are no products: give the folder"),
    ],
)  # fmt: skip
def test_bad_input(plant: Path, break_it: Callable[[Path], None], given: dict[str, object], message: str) -> None:
    break_it(plant)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Products(**{"root": plant, **given})
    assert str(error.value).count("\n") == 0


def test_a_product_that_cannot_be_set_up_is_named(tmp_path: Path) -> None:
    module = Products(members={"x": Folder("x", "good", root=tmp_path / "gone")})
    with pytest.raises(ValueError, match="The images of the product 'x' cannot be found: "):
        module.setup()


def test_a_product_of_one_image_is_named(plant: Path) -> None:
    images(plant / "rare" / "train" / "good", 1)
    images(plant / "rare" / "test" / "good", 1)
    module = ready(Products(plant))
    with pytest.raises(ValueError, match=r"^The product 'rare' has 1 normal training images: give it at least 2"):
        held_out(module.train_data, 0.2)


def test_the_share_held_out_is_that_of_each_product(plant: Path) -> None:
    module = ready(Products(plant))
    held, kept = held_out(module.train_data, 0.4)
    products = module.train_data.samples["product"]
    assert sorted([*held, *kept]) == list(range(18))
    assert Counter(products[held]) == {"bolt": 2, "nut": 2, "washer": 3}
    alone = ready(Products(plant, products=["washer"]))
    first = next(index for index, name in enumerate(products) if name == "washer")
    assert held_out(alone.train_data, 0.4)[0] == [index - first for index in held if products[index] == "washer"]


def test_drawn_products() -> None:
    """Product 0 is the flange; others differ from it and from each other, and their defects lie on the part."""
    for defect in (None, *DEFECTS):
        assert (draw_part(5, 48, defect)[0] == draw_part(5, 48, defect, product=0)[0]).all()
    pictures = [draw_part(5, 48, product=product)[0].astype(int) for product in range(9)]
    for index, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 2 for other in pictures[:index])
    assert len({shape_of(product) for product in range(40)}) == 40
    for product in range(13):
        good, _ = draw_part(9, 96, product=product)
        for defect in DEFECTS:
            bad, mask = draw_part(9, 96, defect, product)
            assert 10 < mask.sum() < 0.1 * mask.size
            changed = np.abs(good.astype(int) - bad).max(axis=2)
            assert changed[mask].mean() > 5 * max(0.1, changed[~mask].mean())


def test_each_drawn_product_has_its_folder(tmp_path: Path) -> None:
    roots = {str(SyntheticParts(root=tmp_path, product=product, **DRAWN).root) for product in range(3)}
    assert len(roots) == 3
    assert str(SyntheticParts(root=tmp_path, **DRAWN).root) in roots
    with pytest.raises(ValueError, match="SyntheticParts was asked for 6, 4 and 2 images"):
        SyntheticParts(root=tmp_path, product=-1, **DRAWN)
    assert torch.is_tensor(ready(Products(members={"a": SyntheticParts(root=tmp_path, **DRAWN)})).train_data[0].image)
