"""Fixtures: a small drawn data set, and one model trained on it, shared by all tests that need one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from anomalib_wtflow import SyntheticParts, WTFlow

os.environ["TRUST_REMOTE_CODE"] = "1"  # anomalib's TorchInferencer asks for it: the .pt file pickles the module
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def parts_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def parts(parts_root: Path) -> SyntheticParts:
    """A data set of 128 px: 16 good parts to train on, 20 + 3 x 4 to validate and test on."""
    return SyntheticParts(root=parts_root, train_images=16, test_images=20, defect_images=4, side=128)


@pytest.fixture(scope="session")
def trained(parts_root: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model fitted to the small data set in three epochs: its module, results folder, checkpoint and data module."""
    root = tmp_path_factory.mktemp("trained")
    parts = SyntheticParts(root=parts_root, train_images=16, test_images=20, defect_images=4, side=128)
    overrides = {"coupling": "worst_of_two", "plateau": 0.0}
    model = WTFlow(max_epochs=3, image_size=128, false_alarm_rate=0.1, overrides=overrides)
    engine = quiet_engine(root)
    engine.fit(model, datamodule=parts)
    return SimpleNamespace(model=model.eval(), root=root, checkpoint=Path(engine.best_model_path), parts=parts)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of 64 px, fitted in a second: the folder of its images (12 + 10 good, 2 of each defect), checkpoint."""
    root = tmp_path_factory.mktemp("small")
    parts = SyntheticParts(root=root, train_images=12, test_images=10, defect_images=2, side=64)
    engine = quiet_engine(root)
    engine.fit(WTFlow(max_epochs=2, image_size=64, false_alarm_rate=0.2, overrides={"plateau": 0.0}), datamodule=parts)
    return SimpleNamespace(root=Path(parts.root), checkpoint=Path(engine.best_model_path))


def quiet_engine(root: Path, **kwargs: object) -> Engine:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=root, **{**options, **kwargs})


def as_mvtec(parts: SyntheticParts, **kwargs: object) -> Folder:
    """The same images with validation = test, as anomalib's MVTecAD has it."""
    parts.prepare_data()
    options = {"val_split_mode": "same_as_test", "num_workers": 0, "train_batch_size": 8, **kwargs}
    return Folder(
        "parts", "train/good", parts.root, "test/scratch", "test/good", "ground_truth/scratch", **options
    )  # fmt: skip
