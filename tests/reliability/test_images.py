"""Image files that a factory can have: handled as anomalib's own models do, or refused by name."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_wtflow import WTFlow
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.images import mark_of, marks_of
from conftest import quiet_engine

Write = Callable[[Image.Image, Path], Any]


def model(**kwargs: Any) -> WTFlow:
    return WTFlow(image_size=64, max_epochs=1, visualizer=False, **{"false_alarm_rate": 0.2, **kwargs})


def folder(root: Path) -> Folder:
    options = {"num_workers": 0, "train_batch_size": 4, "seed": 0, "val_split_mode": "same_as_test"}
    return Folder("parts", "train/good", root, "test/scratch", "test/good", "ground_truth/scratch", **options)


def turned(image: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, quality=100, exif=exif)


SAME: dict[str, Write] = {
    "plain.png": lambda image, path: image.save(path),
    "upper.PNG": lambda image, path: image.save(path),
    "a_png.jpg": lambda image, path: image.save(path, format="png"),
    "cmyk.tif": lambda image, path: image.convert("CMYK").save(path),
    "alpha.png": lambda image, path: image.convert("RGBA").save(path),
    "two_pages.tif": lambda image, path: image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)]),
}
"""Files whose pixels anomalib reads as those of the plain one: alpha and further pages are not looked at."""
OTHER: dict[str, Write] = {
    "grey.png": lambda image, path: image.convert("L").save(path),
    "palette.png": lambda image, path: image.convert("P").save(path),
    "upright.jpg": lambda image, path: turned(image, path, 1),
    "turned.jpg": lambda image, path: turned(image, path, 6),
}
FOREIGN: dict[str, Write] = {
    "one_pixel.png": lambda image, path: image.resize((1, 1)).save(path),
    "long.png": lambda image, path: image.resize((20000, 10)).save(path),
    "black.png": lambda image, path: Image.new("RGB", image.size).save(path),
    "white.png": lambda image, path: Image.new("RGB", image.size, (255, 255, 255)).save(path),
}
"""Whole files, which show no part of the kind."""
DEEP: dict[str, Write] = {
    "16_bit.png": lambda image, path: Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(path),
    "float.tif": lambda image, path: Image.fromarray(np.full((64, 64), 40, np.float32)).save(path),
}


@pytest.fixture(scope="module")
def plain(small: SimpleNamespace) -> Image.Image:
    return Image.open(small.root / "train" / "good" / "003.png").convert("RGB")


def test_files_of_any_kind(small: SimpleNamespace, plain: Image.Image, tmp_path: Path) -> None:
    """The same pixels score alike, and an image of no part is anomalous; EXIF turns nothing, as in anomalib."""
    kinds = {**SAME, **OTHER, **FOREIGN}
    root = tmp_path / "images"
    root.mkdir()
    for name, write in kinds.items():
        write(plain, root / name)
    batches = quiet_engine(tmp_path).predict(model(), data_path=root, ckpt_path=small.checkpoint)
    names = [Path(path).name for batch in batches for path in batch.image_path]
    scores = dict(zip(names, [score for batch in batches for score in batch.raw_score.tolist()], strict=True))
    labels = dict(zip(names, [label for batch in batches for label in batch.pred_label.tolist()], strict=True))
    assert sorted(scores) == sorted(kinds)
    assert {scores[name] for name in SAME} == {scores["plain.png"]}
    assert scores["upright.jpg"] == scores["turned.jpg"]
    assert all(labels[name] for name in FOREIGN)


@pytest.mark.parametrize("name", DEEP)
def test_images_of_more_than_8_bits_are_refused(
    small: SimpleNamespace, plain: Image.Image, tmp_path: Path, name: str
) -> None:
    """In training, test and prediction; anomalib would clip them."""
    for place in ("train", "test"):
        root = Path(shutil.copytree(small.root, tmp_path / place))
        victim = root / place / "good" / name
        DEEP[name](plain, victim)
        engine = quiet_engine(tmp_path / f"results-{place}")
        run = engine.fit if place == "train" else partial(engine.test, ckpt_path=small.checkpoint)
        with pytest.raises(WTFlowError, match=f"'{victim}' has more than 8 bits a channel .*: convert all images to 8"):
            run(model(), datamodule=folder(root))
        with pytest.raises(WTFlowError, match=f"'{victim}' has more than 8 bits"):
            engine.predict(model(), data_path=victim, ckpt_path=small.checkpoint)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_half_a_file_gets_no_verdict(small: SimpleNamespace, plain: Image.Image, tmp_path: Path) -> None:
    """As of a camera that lost its connection."""
    path = tmp_path / "cut.png"
    plain.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match="truncated"):
        quiet_engine(tmp_path).predict(model(), data_path=path, ckpt_path=small.checkpoint)


def test_marks_know_images_again(small: SimpleNamespace, tmp_path: Path) -> None:
    """Wherever they lie; another name, size or content is another image."""
    path = small.root / "train" / "good" / "000.png"
    moved = Path(shutil.copy(path, tmp_path))
    assert mark_of(moved) == mark_of(path)
    assert mark_of(moved.rename(tmp_path / "other.png")) != mark_of(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    moved = tmp_path / "000.png"
    moved.write_bytes(content)
    assert mark_of(moved) != mark_of(path)
    assert marks_of([str(path), str(tmp_path / "gone.png")]).tolist() == [mark_of(path)]


def test_without_masks_there_are_image_metrics(small: SimpleNamespace, tmp_path: Path) -> None:
    data = Folder("copy", "train/good", small.root, "test/scratch", "test/good", num_workers=0, seed=0)
    (metrics,) = quiet_engine(tmp_path).test(model(), datamodule=data, ckpt_path=small.checkpoint, verbose=False)
    assert sorted(metrics) == ["image_AUROC", "image_F1Score"]


def test_nothing_is_written_beside_the_data(small: SimpleNamespace, tmp_path: Path) -> None:
    """So data can be read-only; a whole training and test."""
    root = Path(shutil.copytree(small.root, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    quiet_engine(tmp_path / "results").train(model(false_alarm_rate=0.4), datamodule=folder(root))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_same_image_over_and_over(small: SimpleNamespace, tmp_path: Path) -> None:
    """A covariance of rank zero: the scores are finite, and other parts are anomalous."""
    root = Path(shutil.copytree(small.root, tmp_path / "copy"))
    first, *others = sorted((root / "train" / "good").iterdir())
    for path in others:
        shutil.copy(first, path)
    trained, engine = model(false_alarm_rate=0.4), quiet_engine(tmp_path / "results")
    engine.fit(trained, datamodule=folder(root))
    batches = engine.predict(trained, data_path=root / "test" / "scratch")
    assert all(bool(label) for batch in batches for label in batch.pred_label)
