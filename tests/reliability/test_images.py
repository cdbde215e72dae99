"""Image files that a factory can have: handled as anomalib's own models do, or refused by name; never silently good."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from PIL import Image
from small import folder, model
from torchvision.transforms.v2 import Compose, Transform
from torchvision.tv_tensors import Mask

from anomalib_wtflow import WTFlow
from anomalib_wtflow.reporting.verdicts import read
from conftest import quiet_engine

CLIPPED = "has more than 8 bits a pixel"
UNREADABLE = "cannot be read: remove it or replace it by a whole file"


@pytest.fixture(scope="module")
def plain(small: SimpleNamespace) -> Image.Image:
    return Image.open(small.root / "train" / "good" / "003.png").convert("RGB")


def cut(image: Image.Image, path: Path) -> None:
    """Half of a file, as of a camera that lost its connection."""
    image.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turned(image: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, quality=100, exif=exif)


def alpha(image: Image.Image) -> Image.Image:
    """The image, invisible."""
    result = image.convert("RGBA")
    result.putalpha(0)
    return result


SAME: dict[str, Callable[[Image.Image, Path], Any]] = {
    "plain.png": lambda image, path: image.save(path),
    "upper.PNG": lambda image, path: image.save(path),
    "a_png.jpg": lambda image, path: image.save(path, format="png"),
    "cmyk.tif": lambda image, path: image.convert("CMYK").save(path),
    "opaque.png": lambda image, path: image.convert("RGBA").save(path),
    "transparent.png": lambda image, path: alpha(image).save(path),
    "16_bit_rgb.png": lambda image, path: cv2.imwrite(str(path), np.asarray(image)[..., ::-1].astype(np.uint16) * 257),
    "two_pages.tif": lambda image, path: image.save(path, save_all=True, append_images=[Image.new("RGB", image.size)]),
}
"""Files whose pixels anomalib reads as those of the plain one: alpha and further pages are not looked at."""
OTHER: dict[str, Callable[[Image.Image, Path], Any]] = {
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path, quality=100),
    "grey.png": lambda image, path: image.convert("L").save(path),
    "grey_alpha.png": lambda image, path: image.convert("LA").save(path),
    "palette.png": lambda image, path: image.convert("P").save(path),
    "upright.jpg": lambda image, path: turned(image, path, 1),
    "turned.jpg": lambda image, path: turned(image, path, 6),
}
FOREIGN: dict[str, Callable[[Image.Image, Path], Any]] = {
    "one_bit.png": lambda image, path: image.convert("1").save(path),
    "one_pixel.png": lambda image, path: image.resize((1, 1)).save(path),
    "long.png": lambda image, path: image.resize((20000, 10)).save(path),
    "high.png": lambda image, path: image.resize((10, 20000)).save(path),
    "black.png": lambda image, path: Image.new("RGB", image.size).save(path),
    "white.png": lambda image, path: Image.new("RGB", image.size, (255, 255, 255)).save(path),
    "even.png": lambda image, path: Image.new("RGB", image.size, (128, 128, 128)).save(path),
}
"""Whole files, which show no part of the kind."""
READ = {**SAME, **OTHER, **FOREIGN}
REFUSED: dict[str, tuple[Callable[[Image.Image, Path], Any], str]] = {
    "cut.png": (cut, UNREADABLE),
    "cut.jpg": (cut, UNREADABLE),
    "cut.bmp": (cut, UNREADABLE),
    "cut.tif": (cut, UNREADABLE),
    "nothing.png": (lambda image, path: path.touch(), UNREADABLE),
    "zeros.png": (lambda image, path: path.write_bytes(bytes(5000)), UNREADABLE),
    "text.png": (lambda image, path: path.write_text("not a picture"), UNREADABLE),
    "16_bit.png": (lambda image, path: Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(path), CLIPPED),
    "float.tif": (lambda image, path: Image.fromarray(np.full((64, 64), 40, np.float32)).save(path), CLIPPED),
}


@pytest.fixture(scope="module")
def readable(tmp_path_factory: pytest.TempPathFactory, plain: Image.Image) -> Path:
    """A folder of all images that can be read."""
    root = tmp_path_factory.mktemp("readable")
    for name, write in READ.items():
        write(plain, root / name)
    return root


@pytest.fixture(scope="module")
def scored(small: SimpleNamespace, readable: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Verdicts on these images, by name, from the file that a prediction writes."""
    root = tmp_path_factory.mktemp("scored")
    quiet_engine(root).predict(model(), data_path=readable, ckpt_path=small.checkpoint)
    return {Path(row["image_path"]).name: row for row in read(next(root.rglob("scores.csv")))}


def test_every_readable_image_has_a_verdict(scored: dict[str, Any]) -> None:
    assert sorted(scored) == sorted(READ)
    assert all(np.isfinite(row["raw_score"]) and row["pred_label"] for row in scored.values())


@pytest.mark.parametrize("name", sorted(SAME))
def test_files_of_the_same_pixels_score_alike(scored: dict[str, Any], name: str) -> None:
    assert scored[name]["raw_score"] == scored["plain.png"]["raw_score"]


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_an_image_of_no_part_is_anomalous(scored: dict[str, Any], name: str) -> None:
    assert scored[name]["pred_label"] == "anomalous"
    assert scored[name]["pred_score"] > 0.6


def test_anomalib_does_not_turn_images_by_their_exif_data(scored: dict[str, Any], readable: Path) -> None:
    """A limit: anomalib's reader, and so all of its models, sees them as the sensor did."""
    upright, turned = (read_image(readable / name, as_tensor=True) for name in ("upright.jpg", "turned.jpg"))
    assert torch.equal(upright, turned)
    assert scored["upright.jpg"]["raw_score"] == scored["turned.jpg"]["raw_score"]


def test_anomalibs_padim_reads_the_same_files(
    small: SimpleNamespace, readable: Path, tmp_path: Path, plain: Image.Image
) -> None:
    """Padim scores what WTFlow scores, and fails on what WTFlow refuses to read; 16 bits it clips without a word."""
    padim = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=32)
    engine = quiet_engine(tmp_path)
    padim.pre_processor = Padim.configure_pre_processor(image_size=(64, 64))
    engine.fit(padim, datamodule=folder(small.root))
    batches = engine.predict(padim, data_path=readable)
    assert sorted(Path(path).name for batch in batches for path in batch.image_path) == sorted(READ)
    for name, (write, why) in REFUSED.items():
        path = tmp_path / name
        write(plain, path)
        if why == CLIPPED:
            bright = read_image(path, as_tensor=True)
            assert bright.min() == bright.max() == (1.0 if name == "16_bit.png" else pytest.approx(40 / 255))
            continue
        with pytest.raises((OSError, SyntaxError)):
            read_image(path, as_tensor=True)


def test_readable_images_of_any_kind_can_be_trained_on_and_tested(
    small: SimpleNamespace, readable: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(small.root, tmp_path / "copy"))
    shutil.copytree(readable, root / "train" / "good", dirs_exist_ok=True)
    shutil.copytree(readable, root / "test" / "good", dirs_exist_ok=True)
    trained = model()
    quiet_engine(tmp_path).train(trained, datamodule=folder(root, val_split_mode="same_as_test"))
    assert trained.post_processor.image_threshold.isfinite().all()
    rows = list(read(next(tmp_path.rglob("scores.csv"))))
    assert set(READ) <= {Path(row["image_path"]).name for row in rows}
    assert all(np.isfinite(row["raw_score"]) for row in rows)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_broken_images_are_refused_by_name(
    small: SimpleNamespace, plain: Image.Image, tmp_path: Path, name: str
) -> None:
    """In training, test and prediction; no verdict is written on it."""
    write, why = REFUSED[name]
    for place in ("train", "test"):
        root = Path(shutil.copytree(small.root, tmp_path / place))
        victim = root / place / "good" / name
        write(plain, victim)
        engine = quiet_engine(tmp_path / f"results-{place}")
        run = engine.fit if place == "train" else partial(engine.test, ckpt_path=small.checkpoint)
        with pytest.raises(ValueError, match=f"The image '{victim}' {why}"):
            run(model(), datamodule=folder(root, val_split_mode="same_as_test"))
        with pytest.raises(ValueError, match=f"The image '{victim}' {why}"):
            engine.predict(model(), data_path=victim, ckpt_path=small.checkpoint)
    assert not list(tmp_path.rglob("*.ckpt"))
    for table in tmp_path.rglob("scores.csv"):
        assert name not in table.read_text()


class Dark(Transform):
    """A transform that is undefined for black images."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        del params
        return inpt if isinstance(inpt, Mask) else inpt / (inpt.amax(dim=(-3, -2, -1), keepdim=True) > 0)


def test_an_image_that_is_nan_after_the_transform_gets_no_verdict(small: SimpleNamespace, tmp_path: Path) -> None:
    root = Path(shutil.copytree(small.root, tmp_path / "copy"))
    black = root / "test" / "good" / "black.png"
    Image.new("RGB", (64, 64)).save(black)
    trained = WTFlow.load_from_checkpoint(small.checkpoint)
    transform = Compose([Dark(), *trained.pre_processor.transform.transforms])
    trained.pre_processor = PreProcessor(transform=transform)
    engine = quiet_engine(tmp_path / "results")
    for run in (
        lambda: engine.predict(trained, data_path=black),
        lambda: engine.test(trained, datamodule=folder(root, val_split_mode="same_as_test")),
    ):
        with pytest.raises(ValueError, match=r"The pixels of '.*black.png' are NaN"):
            run()
    shutil.copy(black, root / "train" / "good")
    broken = model()
    broken.pre_processor = PreProcessor(transform=transform)
    with pytest.raises((ValueError, RuntimeError), match=r"NaN or infinite|not finite"):
        engine.fit(broken, datamodule=folder(root))
    assert not list((tmp_path / "results").rglob("*.ckpt"))


# Masks ---------------------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size_is_stretched_as_anomalib_does(small: SimpleNamespace, tmp_path: Path) -> None:
    """A defective image's mask at a quarter of the size: the metrics of a mask scaled up by nearest pixels."""
    metrics = []
    for scaled in (False, True):
        root = Path(shutil.copytree(small.root, tmp_path / str(scaled)))
        for path in (root / "ground_truth" / "scratch").iterdir():
            mask = Image.open(path).resize((16, 16), Image.Resampling.NEAREST)
            (mask.resize((64, 64), Image.Resampling.NEAREST) if scaled else mask).save(path)
        data = folder(root, val_split_mode="same_as_test")
        metrics += quiet_engine(tmp_path).test(model(), datamodule=data, ckpt_path=small.checkpoint, verbose=False)
    assert metrics[0] == metrics[1]
    assert 0 < metrics[0]["pixel_AUROC"] < 1


def test_masks_of_any_kind_are_read_alike(small: SimpleNamespace, tmp_path: Path) -> None:
    """Values of 0 and 1, colour and 16 bits: what is above 0 is defective."""
    kinds: list[Callable[[np.ndarray], Image.Image]] = [
        lambda mask: Image.fromarray(mask),
        lambda mask: Image.fromarray((mask > 0).astype(np.uint8)),
        lambda mask: Image.fromarray(mask).convert("RGBA"),
        lambda mask: Image.fromarray(mask.astype(np.uint16) * 200),
        lambda mask: Image.fromarray(mask).convert("1"),
    ]
    metrics = []
    for kind, convert in enumerate(kinds):
        root = Path(shutil.copytree(small.root, tmp_path / str(kind)))
        for path in (root / "ground_truth" / "scratch").iterdir():
            convert(np.asarray(Image.open(path).convert("L"))).save(path)
        data = folder(root, val_split_mode="same_as_test")
        metrics += quiet_engine(tmp_path).test(model(), datamodule=data, ckpt_path=small.checkpoint, verbose=False)
    assert metrics == [metrics[0]] * len(kinds)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lambda masks: (masks / "001.png").unlink(), "The image '{test}/001.png' has no mask in '{masks}': put one"),
        (lambda masks: (masks / "001.png").rename(masks / "x.png"), "The image '{test}/001.png' has no mask in "),
        (lambda masks: shutil.copy(masks / "001.png", masks / "x.png"), "The mask '{masks}/x.png' is of no image in "),
        (lambda masks: [path.unlink() for path in masks.iterdir()], "There are no images in '{masks}': put images"),
        (lambda masks: (masks / "001.png").write_bytes(b""), "The image '{masks}/001.png' cannot be read"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "test"])
def test_missing_masks_are_named(small: SimpleNamespace, tmp_path: Path, fault: Any, sentence: str, kind: str) -> None:
    root = Path(shutil.copytree(small.root, tmp_path / "copy"))
    masks = root / "ground_truth" / "scratch"
    fault(masks)
    engine = quiet_engine(tmp_path / "results")
    run = engine.fit if kind == "train" else partial(engine.test, ckpt_path=small.checkpoint)
    with pytest.raises(ValueError, match=sentence.format(test=root / "test" / "scratch", masks=masks)):
        run(model(), datamodule=folder(root, val_split_mode="same_as_test"))


def test_without_masks_there_are_image_metrics(small: SimpleNamespace, tmp_path: Path) -> None:
    data = Folder(
        "copy", "train/good", small.root, "test/scratch", "test/good", num_workers=0, val_split_mode="same_as_test"
    )
    (metrics,) = quiet_engine(tmp_path).test(model(), datamodule=data, ckpt_path=small.checkpoint, verbose=False)
    assert sorted(metrics) == ["image_AUROC", "image_F1Score"]
