"""Bad image folders get one sentence that names the file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.training.image_check import flaw
from conftest import quiet_engine


@pytest.fixture
def folder(parts: SyntheticParts, tmp_path: Path) -> Path:
    parts.prepare_data()
    return Path(shutil.copytree(parts.root, tmp_path / "copy"))


def data(folder: Path, **kwargs: str) -> Folder:
    return Folder(
        "copy",
        "train/good",
        folder,
        "test/scratch",
        "test/good",
        "ground_truth/scratch",
        num_workers=0,
        train_batch_size=4,
        **kwargs,
    )


def fit(folder: Path, tmp_path: Path) -> None:
    quiet_engine(tmp_path / "results").fit(
        WTFlow(max_epochs=1, image_size=64, false_alarm_rate=0.3), datamodule=data(folder)
    )


@pytest.mark.parametrize("victim", ["train/good/003.png", "test/good/001.png", "ground_truth/scratch/002.png"])
def test_not_an_image(folder: Path, tmp_path: Path, victim: str) -> None:
    """Found before the training, in whichever set it is."""
    (folder / victim).write_text("this is not a picture")
    with pytest.raises(ValueError, match=f"The image '.*{victim}' cannot be read: remove it or replace it"):
        fit(folder, tmp_path)
    assert not list((tmp_path / "results").rglob("*.ckpt"))


def test_truncated(folder: Path, tmp_path: Path) -> None:
    """The header is whole, so that it shows up only when it is decoded; the message still names the file."""
    victim = folder / "train/good/005.png"
    victim.write_bytes(victim.read_bytes()[:2000])
    assert flaw(str(victim), decode=False) is None
    assert flaw(str(victim), decode=True) == ""
    with pytest.raises(ValueError, match=r"The image '.*005.png' cannot be read"):
        fit(folder, tmp_path)


def test_more_than_8_bits(folder: Path, tmp_path: Path) -> None:
    """anomalib would clip 16-bit grey to white: bad parts would look like good ones."""
    deep = folder / "train/good/003.png"
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(deep)
    message = r"The image '.*003.png' has more than 8 bits a pixel \(mode I(;16)?\), which anomalib clips: convert"
    with pytest.raises(ValueError, match=message):
        fit(folder, tmp_path)
    model = WTFlow(image_size=64)
    with pytest.raises(ValueError, match=message):
        quiet_engine(tmp_path).predict(model, data_path=deep)
    datamodule = data(folder, val_split_mode="same_as_test")
    shutil.move(deep, folder / "test/good/003.png")
    with pytest.raises(ValueError, match=message):
        quiet_engine(tmp_path).test(model, datamodule=datamodule)


def test_several(folder: Path, tmp_path: Path) -> None:
    for index in range(3):
        (folder / f"train/good/00{index}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000.png' \(and 2 more\) cannot be read"):
        fit(folder, tmp_path)


def test_empty_folder(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "train/good")
    (folder / "train/good").mkdir()
    with pytest.raises(ValueError, match=r"There are no images in '.*train/good': put images there"):
        fit(folder, tmp_path)


def test_one_image(folder: Path, tmp_path: Path) -> None:
    """anomalib fails to split test images off a single one."""
    for path in list((folder / "train/good").glob("*.png"))[1:]:
        path.unlink()
    module = Folder("one", "train/good", folder, num_workers=0)
    with pytest.raises(ValueError, match="The training set holds 1 normal images, too few to train"):
        quiet_engine(tmp_path).fit(WTFlow(max_epochs=1, image_size=64), datamodule=module)
