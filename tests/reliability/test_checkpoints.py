"""Checkpoints of other models, versions and settings, broken and hostile ones: refused, whatever reads them."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import Padim
from lightning.pytorch import Trainer

from anomalib_wtflow import WTFlow
from anomalib_wtflow.errors import WTFlowError
from conftest import quiet_engine

SMALL: dict[str, Any] = {"image_size": 128, "false_alarm_rate": 0.1, "overrides": {"coupling": "worst_of_two"}}
"""Settings of the ``trained`` model that a checkpoint compares."""
Spoil = Callable[[dict[str, Any]], Any]


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


WAYS: dict[str, Callable[[Engine, Any, Path], Any]] = {
    "train": lambda engine, parts, path: engine.train(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "test": lambda engine, parts, path: engine.test(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "predict": lambda engine, parts, path: engine.predict(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "export": lambda engine, parts, path: engine.export(WTFlow(**SMALL), "torch", ckpt_path=path),
    "load_from_checkpoint": lambda engine, parts, path: WTFlow.load_from_checkpoint(path),
    "start_from": lambda engine, parts, path: WTFlow(start_from=path, **SMALL),
}


def write(trained: SimpleNamespace, path: Path, spoil: Spoil) -> Path:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("way", WAYS)
def test_no_code_of_a_file_runs(trained: SimpleNamespace, tmp_path: Path, way: str) -> None:
    """Nor is half a file read."""
    mark = tmp_path / "executed"
    hostile = write(trained, tmp_path / "hostile.ckpt", lambda each: each.update(epoch=Hostile(mark)))
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        WAYS[way](quiet_engine(tmp_path), trained.parts, hostile)
    assert not mark.exists()
    whole = trained.checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError):
        WAYS[way](quiet_engine(tmp_path), trained.parts, tmp_path / "cut.ckpt")


BROKEN: dict[str, tuple[Spoil, str]] = {
    "no record": (lambda each: each.pop("wtflow"), "not one of this version of WTFlow"),
    "older": (
        lambda each: each["wtflow"]["settings"].pop("density"),
        "anomalib-wtflow wrote the checkpoint, with other",
    ),
    "newer": (lambda each: each["wtflow"]["settings"].update(tomorrow=1), "wrote the checkpoint, with other settings"),
    "nan weight": (
        lambda each: each["state_dict"]["model.normalization.mean"].fill_(torch.nan),
        "'model.normalization.mean' in the checkpoint is NaN",
    ),
    "infinite threshold": (
        lambda each: each["state_dict"]["post_processor._pixel_threshold"].fill_(torch.inf),
        "'post_processor._pixel_threshold' in the checkpoint is NaN or infinite",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("way", ["test", "load_from_checkpoint", "start_from"])
def test_broken_checkpoints_are_refused(trained: SimpleNamespace, tmp_path: Path, way: str, kind: str) -> None:
    spoil, message = BROKEN[kind]
    path = write(trained, tmp_path / "broken.ckpt", spoil)
    with pytest.raises(WTFlowError, match=message):
        WAYS[way](quiet_engine(tmp_path), trained.parts, path)


def test_another_models_checkpoint_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    padim = Padim(pre_trained=False, layers=["layer1"], n_features=4)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(padim)
    trainer.save_checkpoint(tmp_path / "padim.ckpt", weights_only=True)
    for way in ("test", "load_from_checkpoint", "start_from"):
        with pytest.raises(WTFlowError, match="not one of this version of WTFlow"):
            WAYS[way](quiet_engine(tmp_path), trained.parts, tmp_path / "padim.ckpt")


def test_a_model_of_other_settings_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    """start_time and the rest would load without an error, and change the scores under the same threshold."""
    for changes, message in (
        (
            {"image_size": 256},
            r"trained with image_size=128 \(here 256\): give the model the same, as --model.image_size",
        ),
        ({"image_size": (128, 64)}, r"trained with image_size=128 \(here \[128, 64\]\)"),
        (
            {"overrides": {"start_time": 0.2}},
            r"trained with start_time=0.35 \(here 0.2\): .*--model.overrides.start_time",
        ),
    ):
        model = WTFlow(**{**SMALL, **changes})
        with pytest.raises(WTFlowError, match=message):
            quiet_engine(tmp_path).test(model, datamodule=trained.parts, ckpt_path=trained.checkpoint)
    square = WTFlow(**{**SMALL, "image_size": (128, 128)})
    quiet_engine(tmp_path).validate(square, datamodule=trained.parts, ckpt_path=trained.checkpoint, verbose=False)
