"""Many products in one data module: the right pixels, masks and names, whatever is put together."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_wtflow import Products, SyntheticParts
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.products.datamodule import OneKind

DRAWN: dict[str, Any] = {"train_images": 6, "test_images": 4, "defect_images": 2, "side": 32}
SIDE = 12
NAMES = ("bolt", "nut", "pin")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def spot(seed: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    row, column = np.random.default_rng(seed).integers(0, SIDE - 3, 2)
    mask[row : row + 3, column : column + 2] = 255
    return mask


def save(folder: Path, count: int, first: int, masks: bool = False) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(spot(first + k) if masks else picture(first + k)).save(folder / f"{k}.png")


@pytest.fixture
def plant(tmp_path: Path) -> Path:
    """Bolts and pins with masks, nuts with defects but no masks, washers that are good, all of them."""
    root = tmp_path / "plant"
    for k, name in enumerate(NAMES):
        save(root / name / "train" / "good", 5, 1000 * k)
        save(root / name / "test" / "good", 3, 1000 * k + 100)
        save(root / name / "test" / "bent", 4, 1000 * k + 200)
        if name != "nut":
            save(root / name / "ground_truth" / "bent", 4, 1000 * k + 300, masks=True)
    save(root / "washer", 20, 9000)
    return root


def ready(module: Products) -> Products:
    module.prepare_data()
    module.setup()
    return module


def counted(data: Any) -> dict[str, int]:
    return dict(Counter(data.samples["product"]))


def test_each_item_has_its_own_pixels_mask_and_label(plant: Path) -> None:
    """A fifth of a folder of good images is set aside to test on; the test set validates."""
    module = ready(Products(plant))
    assert module.name == "plant"
    assert counted(module.train_data) == {"bolt": 5, "nut": 5, "pin": 5, "washer": 16}
    assert counted(module.test_data) == counted(module.val_data) == {"bolt": 7, "nut": 7, "pin": 7, "washer": 4}
    seen = set()
    for item in module.test_data:
        seen.add(item.image_path)
        number = int(Path(item.image_path).stem)
        if item.product == "washer":
            seed, masked, bad = 9000 + number, False, False
        else:
            bad = Path(item.image_path).parent.name == "bent"
            seed, masked = 1000 * NAMES.index(item.product) + (200 if bad else 100) + number, item.product != "nut"
        np.testing.assert_array_equal((255 * item.image).round().byte().permute(1, 2, 0).numpy(), picture(seed))
        assert bool(item.gt_label) == bad
        assert (item.gt_mask is not None) == masked
        if masked:
            expected = spot(seed + 100) > 0 if bad else np.zeros((SIDE, SIDE), bool)
            np.testing.assert_array_equal(item.gt_mask.squeeze().numpy().astype(bool), expected)
    assert len(seen) == len(module.test_data)


@pytest.mark.parametrize("size", [2, 5, 100])
@pytest.mark.parametrize("kind", ["test", "val", "predict"])
def test_no_batch_mixes_images_with_masks_and_without(plant: Path, kind: str, size: int) -> None:
    """anomalib cannot collate them, or drops the masks. Each image comes once, and knows its product."""
    module = ready(Products(plant, eval_batch_size=size))
    paths: list[str] = []
    for batch in getattr(module, f"{kind}_dataloader")():
        assert len(batch.image_path) <= size
        assert (batch.gt_mask is not None) == (set(batch.product) <= {"bolt", "pin"})
        if batch.gt_mask is not None:
            assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.bool().tolist()
        for item in batch:
            assert item.product in Path(item.image_path).parts
        paths += batch.image_path
    assert sorted(paths) == sorted(module.test_data.samples["image_path"])


def test_batches_of_one_kind() -> None:
    batches = OneKind(range(6), 3, drop_last=False, kinds=[True, False, True, True, False, True])
    assert list(batches) == [[1, 4], [0, 2, 3], [5]]
    assert len(batches) == 3


def test_batches_of_arrays_know_their_products(plant: Path) -> None:
    module = ready(Products(plant, products=["bolt", "pin"], eval_batch_size=100))
    (batch,) = module.test_dataloader()
    expected = [item.product for item in batch]
    assert sorted(set(expected)) == ["bolt", "pin"]
    arrays = batch.to_numpy()
    assert arrays.product == [item.product for item in arrays] == expected


def test_a_fifth_of_good_images_is_set_aside_by_the_seed(plant: Path) -> None:
    def split(seed: int) -> tuple[set[str], set[str]]:
        module = ready(Products(plant, products=["washer"], seed=seed))
        return set(module.train_data.samples["image_path"]), set(module.test_data.samples["image_path"])

    train, test = split(0)
    assert (len(train), len(test)) == (16, 4)
    assert train | test == {str(plant / "washer" / f"{k}.png") for k in range(20)}
    assert split(0) == (train, test)
    assert split(2)[1] != test


def test_members(plant: Path, tmp_path: Path) -> None:
    """Any data modules, by name, as a class with arguments or as they are, beside folders."""
    flange = {"class_path": "SyntheticParts", "init_args": {"root": str(tmp_path / "drawn"), **DRAWN}}
    other = SyntheticParts(root=tmp_path / "drawn", product=1, **DRAWN)
    module = ready(Products(plant, products=["bolt"], members={"flange": flange, "other": other}))
    assert counted(module.train_data) == {"bolt": 5, "flange": 6, "other": 6}
    assert module.name == "plant"
    assert Products(members={"flange": flange}, name="all").name == "all"


def test_hidden_folders_and_files_are_no_products(plant: Path) -> None:
    (plant / ".thumbnails").mkdir()
    (plant / "notes.txt").write_text("bolts are on the left")
    assert list(Products(plant).members) == [*NAMES, "washer"]


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("break_it", "given", "message"),
    [
        (emptied, {}, r"There is no product folder '.*plant/\*'"),
        (
            lambda plant: shutil.rmtree(plant / "nut/train"),
            {},
            r"The product folder '.*nut' has folders \(test\) but no",
        ),
        (lambda plant: emptied(plant / "washer"), {}, r"The product folder '.*washer' holds no images: put good"),
        (lambda plant: None, {"products": ["screw"]}, r"There is no product folder '.*screw': '.*' has bolt, nut"),
        (lambda plant: None, {"members": {"nut": "SyntheticParts"}}, r"The product 'nut' is given twice"),
        (lambda plant: None, {"root": None}, r"There are no products: give the folder"),
    ],
)
def test_bad_input(plant: Path, break_it: Callable[[Path], Any], given: dict[str, Any], message: str) -> None:
    break_it(plant)
    with pytest.raises(WTFlowError, match=f"^{message}"):
        Products(**{"root": plant, **given})


def test_members_that_give_no_plain_images_are_named(plant: Path) -> None:
    with pytest.raises(WTFlowError, match=r"^The product 'part' is of Products, which gives no plain images"):
        Products(members={"part": Products(plant)}).setup()
