"""Disks that are full and folders that cannot be written to: a sentence that names them, and no half file."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from commands import CONTEXT, checkpoint, run, runs, training
from torch.utils.data import DataLoader

from anomalib_wtflow import SyntheticParts, WTFlow, diagnose
from anomalib_wtflow.features.cache import FeatureStore
from anomalib_wtflow.operation.calibrate import save
from anomalib_wtflow.operation.checkpoint import load_model
from anomalib_wtflow.reporting.verdicts import Verdicts, read
from anomalib_wtflow.training.resuming import whole, write_whole
from anomalib_wtflow.writing import one_sentence_for
from conftest import quiet_engine

SETTINGS: Any = {"image_size": 64, "max_epochs": 3, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0}}
NOWHERE = "/proc/none"
"""A folder that nobody can make, root neither."""


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A disk of its own."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "wtflow-test", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", "size=1m") as folder:
        yield folder


def parts(root: Path) -> SyntheticParts:
    return SyntheticParts(root, 16, 8, 4, 64, train_batch_size=8)


# The cache ------------------------------------------------------------------------------------------------------------


def test_no_room_for_the_cache(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    store = FeatureStore(4, 0)
    with pytest.raises(ValueError, match=rf"needs 0.0021 GB in {small_disk} \(No space left on device\): set TMP"):
        store.append(torch.zeros(1, 512, 16, 16))
    del store
    assert list(small_disk.iterdir()) == []
    fits = FeatureStore(1, 0)
    fits.append(torch.ones(1, 512, 16, 16))
    assert fits.features.sum() == 512 * 256


def test_no_file_of_that_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with largest_file(1000), pytest.raises(ValueError, match=rf"GB in {tmp_path} \(File too large\): set TMPDIR to"):
        FeatureStore(4, 0).append(torch.zeros(1, 5, 16, 16))


def fill_a_store_on_a_disk_that_fills_up(folder: Path) -> None:
    """In a process of its own: a mapped file without room would end it."""
    import tempfile

    tempfile.tempdir = str(folder)
    store = FeatureStore(2, 0)
    store.append(torch.ones(1, 200, 16, 16))
    with (folder / "other").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    store.append(torch.ones(1, 200, 16, 16))
    sys.exit(int(store.features.sum() != 2 * 200 * 256))


@pytest.mark.slow
def test_the_disk_fills_up_while_features_are_written(small_disk: Path) -> None:
    """The room was reserved, so the cache does not notice."""
    process = CONTEXT.Process(target=fill_a_store_on_a_disk_that_fills_up, args=(small_disk,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert (small_disk / "other").stat().st_size > 500_000


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [NOWHERE])


def test_no_folder_for_temporary_files(no_temporary_folder: None, tmp_path: Path) -> None:
    """A training whose features fit into memory needs none; another one says what it needs."""
    data = parts(tmp_path)
    engine = quiet_engine(tmp_path)
    engine.fit(WTFlow(**SETTINGS), datamodule=data)
    assert torch.load(engine.best_model_path, weights_only=True)["epoch"] == 2
    model = WTFlow(**{**SETTINGS, "overrides": {"plateau": 0.0, "feature_cache": 1e-6}})
    sentence = rf"needs a folder for temporary files \(No usable temporary .*{NOWHERE}.*\): set TMPDIR to one that can"
    with pytest.raises(ValueError, match=sentence):
        quiet_engine(tmp_path).fit(model, datamodule=data)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_no_room_for_a_calibrated_checkpoint(trained: SimpleNamespace, tmp_path: Path) -> None:
    """What stood in its place is as it was."""
    target = tmp_path / "model.ckpt"
    shutil.copy(trained.checkpoint, target)
    model, _, _ = load_model(trained.checkpoint)
    sentence = rf"The checkpoint cannot be written to {target} \(File too large\): make room there, or give --output"
    with largest_file(1_000_000), pytest.raises(RuntimeError, match=sentence):
        save(trained.checkpoint, target, model)
    assert target.read_bytes() == trained.checkpoint.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_is_no_file_or_no_folder(trained: SimpleNamespace, tmp_path: Path) -> None:
    """There is room, but not there; an image that is read from elsewhere is another matter."""
    model, _, _ = load_model(trained.checkpoint)
    words = rf"^The checkpoint cannot be written to {tmp_path} \(Is a directory\): make room there, or give --output"
    with pytest.raises(RuntimeError, match=words):
        save(trained.checkpoint, tmp_path, model)
    (tmp_path / "file").touch()
    with pytest.raises(
        RuntimeError, match=rf"^A checkpoint cannot be written to {tmp_path}/file \(File exists\): make"
    ):
        write_whole(tmp_path / "file" / "model.ckpt", b"")
    image = tmp_path / "parts" / "a.png"
    with (
        pytest.raises(FileNotFoundError),
        one_sentence_for("The pictures", tmp_path / "results" / "latest" / "images", "do without"),
    ):
        image.read_bytes()


class Filling(WTFlow):
    """Meets a full disk in its second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_no_room_for_a_checkpoint(tmp_path: Path) -> None:
    """The last one stays as it was, and the training goes on from it once there is room."""
    whole, engine = WTFlow(**SETTINGS), quiet_engine(tmp_path / "full")
    quiet_engine(tmp_path / "whole").fit(whole, datamodule=parts(tmp_path))
    sentence = r"cannot be written to (\S+) \(File too large\): .*; the last whole one is \1/model.ckpt\."
    with largest_file(resource.RLIM_INFINITY), pytest.raises(RuntimeError, match=sentence):
        engine.fit(Filling(**SETTINGS), datamodule=parts(tmp_path))
    last = Path(engine.best_model_path)
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert list(last.parent.iterdir()) == [last]
    resumed = WTFlow(**SETTINGS)
    quiet_engine(tmp_path / "resumed").fit(resumed, datamodule=parts(tmp_path), ckpt_path=last)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_disk_with_room_for_one_checkpoint(small_disk: Path) -> None:
    """The new one does not fit beside the old one, which is left as it is."""
    file = small_disk / "weights" / "model.ckpt"
    write_whole(file, b"1" * 600_000)
    with pytest.raises(RuntimeError, match=rf"written to {file.parent} \(No space left on device\): .* is {file}\."):
        write_whole(file, b"2" * 600_000)
    assert list(file.parent.iterdir()) == [file]
    assert file.read_bytes() == b"1" * 600_000
    with pytest.raises(RuntimeError, match=r"\(No space left on device\): .*; there is none yet\."):
        write_whole(small_disk / "other" / "model.ckpt", b"2" * 600_000)
    assert list((small_disk / "other").iterdir()) == []


def test_checkpoints_are_as_lightning_writes_them(tmp_path: Path) -> None:
    """The same content and the same mode; and a user's own way of writing them is kept."""
    from anomalib.engine.plugins import AnomalibCheckpointIO
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Own(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint({"own": True}, path)

    theirs = AnomalibCheckpointIO()
    saved = {"weights": torch.randn(3), "epoch": 4}
    modes = []
    for name, write in (("theirs", theirs.save_checkpoint), ("ours", whole(theirs.save_checkpoint))):
        write(saved, tmp_path / name / "model.ckpt")
        loaded = theirs.load_checkpoint(tmp_path / name / "model.ckpt")
        assert torch.equal(loaded["weights"], saved["weights"])
        assert loaded["epoch"] == 4
        modes.append((tmp_path / name / "model.ckpt").stat().st_mode)
    assert modes[0] == modes[1]
    engine = quiet_engine(tmp_path, plugins=[Own()])
    engine.fit(WTFlow(**{**SETTINGS, "max_epochs": 1}), datamodule=parts(tmp_path))
    assert torch.load(engine.best_model_path, weights_only=True) == {"own": True}


# Results --------------------------------------------------------------------------------------------------------------


def test_no_room_for_the_verdicts(tmp_path: Path) -> None:
    """An error of a full disk names no file: ours does, and how to do without."""
    trainer: Any = SimpleNamespace(default_root_dir=tmp_path, global_rank=0)
    sentence = rf"cannot be written to {tmp_path}/scores.csv \(File too large\): .* --model.overrides.verdicts f"
    with largest_file(10), pytest.raises(RuntimeError, match=sentence):
        Verdicts()._start(trainer, SimpleNamespace(product_names=[""]))


def test_what_fails_for_want_of_room_and_what_does_not(tmp_path: Path) -> None:
    """A library's error may be silent on that: the folder is asked. Others stay as they are."""
    sentence = rf"^It cannot be written to {tmp_path}/file \({{}}\): do without\.$"
    for error in (OSError(30, "Read-only file system"), OSError(28, "")):
        expected = pytest.raises(RuntimeError, match=sentence.format(os.strerror(error.errno)))
        with expected as raised, one_sentence_for("It", tmp_path / "file", "do without"):
            raise error
        assert raised.value.__cause__ is error
    for other in (FileNotFoundError(2, "No such file"), RuntimeError("iostream error"), ValueError("28")):
        with pytest.raises(type(other)) as raised, one_sentence_for("It", tmp_path / "no" / "file", "do without"):
            raise other
        assert raised.value is other
    expected = pytest.raises(RuntimeError, match=sentence.format("File too large"))
    with largest_file(10), expected, one_sentence_for("It", tmp_path / "file", "do without"):
        raise RuntimeError("iostream error")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_no_room_for_an_export(trained: SimpleNamespace, small_disk: Path, kind: str) -> None:
    model = WTFlow.load_from_checkpoint(trained.checkpoint).eval()
    sentence = (
        rf"^The export cannot be written to {small_disk} \(No space left on device\): make room there, or give --exp"
    )
    with pytest.raises(RuntimeError, match=sentence):
        getattr(model, f"to_{kind}")(small_disk)


@pytest.mark.slow
def test_no_room_for_pictures(trained: SimpleNamespace, small_disk: Path) -> None:
    """Verdicts of the batches before stay."""
    engine = Engine(logger=False, accelerator="cpu", devices=1, default_root_dir=small_disk)
    model = WTFlow.load_from_checkpoint(trained.checkpoint, visualizer=True)
    sentence = (
        rf"^The pictures cannot be written to {small_disk}\S*/images \(No space left on device\): .*visualizer false\.$"
    )
    with pytest.raises(RuntimeError, match=sentence):
        engine.predict(
            model,
            dataloaders=DataLoader(
                PredictDataset(trained.parts.root / "test"), batch_size=4, collate_fn=ImageBatch.collate
            ),
        )
    assert len(list(read(next(small_disk.rglob("scores.csv"))))) in range(1, 32)


@pytest.mark.slow
def test_no_room_for_a_diagnosis(trained: SimpleNamespace, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(1_000_000))
    sentence = (
        rf"^The diagnosis cannot be written to {small_disk}/page/\S* \(No space left on device\): .* as --output\.$"
    )
    with pytest.raises(RuntimeError, match=sentence):
        diagnose(trained.checkpoint, trained.parts, small_disk / "page", control_steps=0, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["read-only", "a file"])
def test_results_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    """anomalib makes the folder, before any model is asked."""
    with disk(tmp_path / "disk", "size=1m") as folder:
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            folder = folder / "file"
            folder.touch()
        done = run(tmp_path, *training(tmp_path / "data"), "--default_root_dir", folder)
        assert done.status == 1
        last = done.text.splitlines()[-1]
        said = {"read-only": "Read-only file system", "a file": "Not a directory"}[kind]
        assert re.fullmatch(
            rf"error: '{folder}/WTFlow\S*' cannot be used \({said}\): see to that, or give another place\.", last
        )
    assert runs(tmp_path) == []


# Homes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_home_that_nobody_can_write_to(tmp_path: Path) -> None:
    """Nor any of the folders that libraries keep caches in; started anew, since they look when they are imported."""
    program = Path(sys.executable).with_name("anomalib")
    (tmp_path / "temporary").mkdir()
    homes = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR")
    environment = {**os.environ, **dict.fromkeys(homes, NOWHERE), "TMPDIR": str(tmp_path / "temporary")}
    command = [program, *training(tmp_path / "data", "--model.overrides.feature_cache", "1e-6")]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (only,) = runs(tmp_path)
    assert checkpoint(only).is_file()
    assert (only / "scores.json").is_file()
    assert list((tmp_path / "temporary").glob("wtflow*")) == []


@pytest.mark.slow
def test_no_home(tmp_path: Path) -> None:
    done = run(tmp_path, *training(tmp_path / "data", epochs=1), HOME=None, USER=None, LOGNAME=None)
    assert done.status == 0, done.text
    (only,) = runs(tmp_path)
    assert checkpoint(only).is_file()
