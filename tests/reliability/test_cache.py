"""No cache of features outlives its training, so none can be stale: what lies about is not read, and is left alone."""

import mmap
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from PIL import Image

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.features.cache import FeatureStore, Share
from anomalib_wtflow.training.feature_caching import FeatureCaching
from conftest import quiet_engine

IN_FILES = {"plateau": 0.0, "feature_cache": 1e-6}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = SyntheticParts(tmp_path_factory.mktemp("images"), 16, 8, 4, 64)
    parts.prepare_data()
    return Path(parts.root)


def train(root: Path, images: Path, precision: Any = "32-true", **kwargs: Any) -> dict[str, torch.Tensor]:
    """Train for an epoch with features in files, and return all that the model then holds."""
    model = WTFlow(**{"image_size": 64, "max_epochs": 1, "false_alarm_rate": 0.3, "overrides": IN_FILES, **kwargs})
    data = Folder("parts", "train/good", images, normal_test_dir="test/good", num_workers=0, train_batch_size=8, seed=0)
    quiet_engine(root, precision=precision).fit(model, datamodule=data)
    return model.state_dict()


@pytest.fixture(scope="session")
def clean(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What a training gives that nothing came before."""
    return train(tmp_path_factory.mktemp("clean"), images)


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models are the same bit by bit."""
    return all(torch.equal(value.nan_to_num(7), other[name].nan_to_num(7)) for name, value in one.items())


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "executed")


def test_what_lies_in_the_folder_is_not_read(images: Path, clean: Any, temporary: Path, tmp_path: Path) -> None:
    """Names as the cache gives them: half a file, no cache at all, zeros of the right size, a pickle that runs code."""
    executed = tmp_path / "executed"
    contents = [b"", b"half a fi", bytes(13 * 176 * 16 * 4), pickle.dumps(Hostile(executed))]
    for number, content in enumerate(contents):
        folder = temporary / f"wtflow-features-{number:032x}-0"
        folder.mkdir()
        for name in ("features", *(f"features-{k}" for k in range(1, 6))):
            (folder / name).write_bytes(content)
    planted = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in temporary.rglob("*") if path.is_file()}
    assert alike(train(tmp_path, images), clean)
    left = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in temporary.rglob("*") if path.is_file()}
    assert left == planted
    assert not executed.exists()


@pytest.mark.parametrize(
    "before",
    [
        {"image_size": 96},
        {"layers": ["blocks.1", "blocks.2"]},
        {"backbone": "resnet18", "pre_trained": False},
        {"precision": "bf16-mixed"},
    ],
)
def test_another_training_before_it_changes_nothing(
    images: Path, clean: Any, temporary: Path, tmp_path: Path, before: dict[str, Any]
) -> None:
    """Of another image size, layer, backbone or precision, with the same folder for temporary files."""
    train(tmp_path, images, **before)
    assert list(temporary.iterdir()) == []
    assert alike(train(tmp_path, images), clean)


def test_other_images_of_the_same_names_sizes_and_times(images: Path, temporary: Path, tmp_path: Path) -> None:
    """What counts is what is in the files when a training begins."""
    changing, other = tmp_path / "changing", tmp_path / "other"
    before = train(tmp_path, copy(images, changing))
    for path in sorted(changing.rglob("*.bmp")):
        known = path.stat()
        Image.open(path).rotate(90).save(path)
        os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    after = train(tmp_path, changing)
    assert not alike(after, before)
    assert alike(after, train(tmp_path, copy(changing, other)))


def copy(images: Path, target: Path) -> Path:
    """Copy images as bitmaps, whose size does not depend on what they show."""
    for path in images.rglob("good/*.*"):
        place = (target / path.relative_to(images)).with_suffix(".bmp")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(place)
    return target


def test_images_that_vanish_while_it_trains(images: Path, clean: Any, temporary: Path, tmp_path: Path) -> None:
    """A good cache is used to the end: no epoch opens an image, so a folder that is emptied meanwhile is no loss."""
    vanishing = copy(images, tmp_path / "vanishing")
    passed: list[int] = []

    class Vanishing(WTFlow):
        def on_train_start(self) -> None:
            passed.append(len(list(vanishing.rglob("train/**/*.bmp"))))
            for path in vanishing.rglob("train/**/*.bmp"):
                path.unlink()

    model = Vanishing(image_size=64, max_epochs=1, false_alarm_rate=0.3, overrides=IN_FILES)
    data = Folder(
        "parts", "train/good", vanishing, normal_test_dir="test/good", num_workers=0, train_batch_size=8, seed=0
    )
    quiet_engine(tmp_path).fit(model, datamodule=data)
    assert passed == [16]
    assert alike(model.state_dict(), clean)


@pytest.mark.skipif(os.name != "posix", reason="Modes and names of mapped files are POSIX's.")
def test_files_are_private_and_have_no_name_once_mapped(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one process never has one."""
    made: list[tuple[int, int]] = []
    mapping = mmap.mmap

    def spy(descriptor: int, size: int) -> mmap.mmap:
        status = os.fstat(descriptor)
        made.append((stat.S_IMODE(status.st_mode), status.st_nlink))
        return mapping(descriptor, size)

    monkeypatch.setattr(mmap, "mmap", spy)
    old = os.umask(0)
    try:
        store, features = FeatureStore(3, 0), torch.randn(2, 4, 3, 3)
        store.append(features)
        store.append(features[:1])
        trainer = SimpleNamespace(
            num_devices=2,
            local_rank=0,
            node_rank=0,
            datamodule=None,
            strategy=SimpleNamespace(broadcast=lambda name: name),
        )
        caching = FeatureCaching(1.0)
        caching.on_fit_start(trainer, None)
        shared = caching._share.folder
        FeatureStore(1, 1e9, caching._share).append(features[:1])
    finally:
        os.umask(old)
    assert made == [(0o600, 0), (0o600, 1)]
    assert list(temporary.iterdir()) == [shared]
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    assert torch.equal(store.features, torch.cat([features, features[:1]]))


@pytest.mark.skipif(os.name != "posix", reason="A mapped file keeps its name elsewhere.")
def test_a_shared_file_loses_its_name_when_all_have_mapped_it(tmp_path: Path) -> None:
    share = tmp_path / "shared"
    share.mkdir()
    stores = [FeatureStore(2, 1e9, Share(share, rank, 2)) for rank in (0, 1)]
    for number, store in enumerate(stores):
        store.append(torch.full((1, 2, 2, 2), float(number)))
    assert [path.name for path in share.iterdir()] == ["features"]
    stores[0].unlink()
    assert list(share.iterdir()) == []
    for store in stores:
        assert store.rows is not None
        assert store.rows[:, 0, 0, 0].tolist() == [0, 1]


def test_a_file_that_is_there_already_is_written_anew(tmp_path: Path) -> None:
    """Longer or shorter, and of whatever content: each process writes its part before any reads it."""
    for content in (b"", b"short", b"x" * 4000):
        (tmp_path / "features").write_bytes(content)
        stores = [FeatureStore(4, 0, Share(tmp_path, rank, 2)) for rank in (0, 1)]
        rows = torch.randn(4, 3, 2, 2)
        for store, part in zip(stores, rows.split(2), strict=True):
            store.append(part)
        for store in stores:
            assert store.rows is not None
            assert torch.equal(store.rows, rows)


def test_nothing_is_left_after_a_failure(images: Path, temporary: Path, tmp_path: Path) -> None:
    class Failing(WTFlow):
        def on_train_start(self) -> None:
            raise ZeroDivisionError

    model = Failing(image_size=64, max_epochs=1, false_alarm_rate=0.3, overrides=IN_FILES)
    data = Folder("parts", "train/good", images, normal_test_dir="test/good", num_workers=0, seed=0)
    with pytest.raises(ZeroDivisionError):
        quiet_engine(tmp_path).fit(model, datamodule=data)
    assert list(temporary.iterdir()) == []
