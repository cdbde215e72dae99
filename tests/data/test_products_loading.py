"""What the data module ``Products`` brings: the right pixels, masks and names, whatever is put together."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_wtflow import Products, SyntheticParts

DRAWN: dict[str, Any] = {"train_images": 6, "test_images": 4, "defect_images": 2, "side": 32}
SIDE = 12


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def spot(seed: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    row, column = np.random.default_rng(seed).integers(0, SIDE - 3, 2)
    mask[row : row + 3, column : column + 2] = 255
    return mask


def save(folder: Path, count: int, first: int, masks: bool = False) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = spot(first + index) if masks else picture(first + index)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture
def plant(tmp_path: Path) -> Path:
    """Bolts and pins with masks, nuts with defects but no masks, washers that are good, all of them."""
    root = tmp_path / "plant"
    for place, name in enumerate(("bolt", "nut", "pin")):
        save(root / name / "train" / "good", 5, 1000 * place)
        save(root / name / "test" / "good", 3, 1000 * place + 100)
        save(root / name / "test" / "bent", 4, 1000 * place + 200)
        if name != "nut":
            save(root / name / "ground_truth" / "bent", 4, 1000 * place + 300, masks=True)
    save(root / "washer", 20, 9000)
    return root


def ready(module: Products) -> Products:
    module.prepare_data()
    module.setup()
    return module


def test_each_item_has_its_own_pixels_mask_and_label(plant: Path) -> None:
    module, names = ready(Products(plant)), ("bolt", "nut", "pin")
    seen = set()
    for item in module.test_data:
        seen.add(item.image_path)
        number = int(Path(item.image_path).stem)
        if item.product == "washer":
            seed, masked, bad = 9000 + number, False, False
        else:
            bad = Path(item.image_path).parent.name == "bent"
            seed, masked = 1000 * names.index(item.product) + (200 if bad else 100) + number, item.product != "nut"
        np.testing.assert_array_equal((255 * item.image).round().byte().permute(1, 2, 0).numpy(), picture(seed))
        assert bool(item.gt_label) == bad
        assert (item.gt_mask is not None) == masked
        if masked:
            expected = spot(seed + 100) > 0 if bad else np.zeros((SIDE, SIDE), bool)
            np.testing.assert_array_equal(item.gt_mask.squeeze().numpy().astype(bool), expected)
    assert len(seen) == len(module.test_data) == 3 * 7 + 4


@pytest.mark.parametrize("size", [2, 5, 100])
@pytest.mark.parametrize("kind", ["test", "val", "predict"])
def test_no_batch_mixes_images_with_masks_and_without(plant: Path, kind: str, size: int) -> None:
    """Of any set that is evaluated: anomalib cannot collate them, or drops the masks. Each image comes once."""
    module = ready(Products(plant, eval_batch_size=size))
    loader: Any = getattr(module, f"{kind}_dataloader")()
    paths: list[str] = []
    for batch in loader:
        assert len(batch.image_path) <= size
        assert (batch.gt_mask is not None) == (set(batch.product) <= {"bolt", "pin"})
        if batch.gt_mask is not None:
            assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.bool().tolist()
        else:
            assert set(batch.product) <= {"nut", "washer"}
        paths += batch.image_path
    assert sorted(paths) == sorted(module.test_data.samples["image_path"])


def test_batches_of_arrays_can_be_iterated_over(plant: Path) -> None:
    """As those of tensors can, with the same products."""
    module = ready(Products(plant, products=["bolt", "pin"], eval_batch_size=100))
    (batch,) = module.test_dataloader()
    expected = [item.product for item in batch]
    assert sorted(set(expected)) == ["bolt", "pin"]
    assert [item.to_numpy().product for item in batch] == expected
    arrays = batch.to_numpy()
    assert arrays.product == expected
    assert [item.product for item in arrays] == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fifth_of_good_images_is_set_aside_by_the_seed(plant: Path, seed: int) -> None:
    def split(seed: int) -> tuple[set[str], set[str]]:
        module = ready(Products(plant, products=["washer"], seed=seed))
        return tuple(set(data.samples["image_path"]) for data in (module.train_data, module.test_data))  # type: ignore[return-value]

    train, test = split(seed)
    assert (len(train), len(test)) == (16, 4)
    assert train | test == {str(plant / "washer" / f"{index}.png") for index in range(20)}
    assert split(seed) == (train, test)
    assert split(seed + 2)[1] != test


def test_the_balanced_order_is_that_of_the_seed(plant: Path) -> None:
    """The same in each loader of a seed; one after another, epochs differ."""

    def orders(seed: int) -> list[list[int]]:
        sampler = ready(Products(plant, balance=1.0, seed=seed)).train_dataloader().sampler
        return [list(sampler), list(sampler)]

    first, second = orders(3)
    assert len(first) == 15 + 16
    assert first != second
    assert orders(3) == [first, second]
    assert orders(4)[0] != first


@pytest.mark.parametrize("how", ["relative", "here", "link", "from above"])
def test_the_whole_is_called_as_its_folder(
    plant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """However the folder is given; results and pictures lie in a folder of that name."""
    (tmp_path / "works").symlink_to(plant)
    monkeypatch.chdir(plant if how == "here" else tmp_path)
    root = {"relative": "plant", "here": ".", "link": tmp_path / "works", "from above": plant / "bolt" / ".."}[how]
    module = ready(Products(root, products=["bolt"]))
    assert module.name == ("works" if how == "link" else "plant")
    for path in module.test_data.samples["image_path"]:
        assert module.name in Path(path).parts
        assert os.path.realpath(path).startswith(str(plant.resolve() / "bolt"))


def test_hidden_folders_are_no_products(plant: Path) -> None:
    (plant / ".thumbnails").mkdir()
    (plant / "notes.txt").write_text("bolts are on the left")
    assert list(Products(plant).members) == ["bolt", "nut", "pin", "washer"]


def test_a_member_may_have_no_root(plant: Path, tmp_path: Path) -> None:
    """anomalib's ``Folder`` takes whole paths then."""
    good = Folder("x", normal_dir=plant / "washer", val_split_mode="none", num_workers=0, seed=0)
    drawn = SyntheticParts(root=tmp_path / "drawn", **DRAWN)
    module = ready(Products(members={"washer": good, "flange": drawn}))
    assert module.train_data.samples["product"].value_counts().to_dict() == {"washer": 16, "flange": 6}
    assert module.name


def test_members_are_named_where_they_cannot_be_used(plant: Path) -> None:
    for member, message in [
        ({"class_path": "SyntheticParts", "init_args": {"sides": 3}}, "cannot be made of .*sides"),
        ({"class_path": "SyntheticParts", "init_args": {"side": 3}}, "cannot be made of .* 3 pixels"),
        (7, "cannot be made of 7"),
    ]:
        with pytest.raises(ValueError, match=rf"^The product 'part' {message}") as error:
            Products(plant, members={"part": member})
        assert "\n" not in str(error.value)
    nested = Products(members={"part": Products(plant)})
    with pytest.raises(ValueError, match=r"^The product 'part' is of Products, which gives no plain images"):
        nested.setup()
