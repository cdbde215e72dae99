"""The counterpart of anomalib's tests/integration/model/test_models.py, with values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.models import get_model
from lightning import seed_everything
from PIL import Image

from anomalib_wtflow.data.drawing import draw_part
from conftest import quiet_engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set in MVTec's layout, which anomalib's MVTecAD reads: category `dummy`."""
    root = tmp_path_factory.mktemp("mvtecad")
    sets = [("train/good", 30, None), ("test/good", 4, None), ("test/bad", 4, "missing")]
    for seed, (name, count, defect) in enumerate(sets):
        folder = root / "dummy" / name
        folder.mkdir(parents=True)
        for index in range(count):
            image, mask = draw_part(100 * seed + index, 128, defect)
            Image.fromarray(image).save(folder / f"{index:03d}.png")
            if defect:
                truth = root / "dummy" / "ground_truth" / "bad"
                truth.mkdir(parents=True, exist_ok=True)
                Image.fromarray(255 * mask.astype(np.uint8)).save(truth / f"{index:03d}_mask.png")
    return root


@pytest.fixture(scope="module")
def project_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


def objects(dataset_path: Path, project_path: Path, **kwargs: object):
    seed_everything(0)
    datamodule = MVTecAD(root=dataset_path, category="dummy", train_batch_size=2, num_workers=0)
    engine = quiet_engine(project_path, max_epochs=1, devices=1, **kwargs)
    return get_model("WTFlow", max_epochs=10, false_alarm_rate=0.4, overrides={"plateau": 0.0}), datamodule, engine


@pytest.fixture(scope="module")
def checkpoint(dataset_path: Path, project_path: Path) -> Path:
    model, datamodule, engine = objects(dataset_path, project_path)
    engine.fit(model=model, datamodule=datamodule)
    path = project_path / "WTFlow/MVTecAD/dummy/v0/weights/lightning/model.ckpt"
    assert str(path) == engine.best_model_path
    return path


def test_fit(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=False)
    assert state["epoch"] == 0  # the pass that collects
    assert state["state_dict"]["post_processor._image_threshold"] > 0


def test_test(dataset_path: Path, project_path: Path, checkpoint: Path) -> None:
    model, datamodule, engine = objects(dataset_path, project_path)
    (metrics,) = engine.test(model=model, datamodule=datamodule, ckpt_path=checkpoint)
    assert metrics["image_AUROC"] == 1.0
    assert metrics["pixel_AUROC"] > 0.95
    assert 0 < metrics["image_F1Score"] <= 1


def test_train(dataset_path: Path, project_path: Path, checkpoint: Path) -> None:
    model, datamodule, engine = objects(dataset_path, project_path)
    (metrics,) = engine.train(model=model, datamodule=datamodule, ckpt_path=checkpoint)
    assert metrics["image_AUROC"] == 1.0


def test_validate(dataset_path: Path, project_path: Path, checkpoint: Path) -> None:
    model, datamodule, engine = objects(dataset_path, project_path)
    engine.validate(model=model, datamodule=datamodule, ckpt_path=checkpoint)
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]["post_processor._image_threshold"]
    assert model.post_processor.image_threshold == saved


def test_predict(dataset_path: Path, project_path: Path, checkpoint: Path) -> None:
    model, datamodule, engine = objects(dataset_path, project_path)
    batches = engine.predict(model=model, ckpt_path=checkpoint, datamodule=datamodule)
    scores, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("pred_score", "pred_label"))
    truth = torch.cat([b.gt_label for b in batches]).bool()
    assert torch.equal(labels, scores > 0.5)
    assert scores[truth].min() > scores[~truth].max()
    assert labels[truth].all()
    for batch in batches:
        assert torch.equal(batch.pred_mask, batch.anomaly_map > 0.5)
        assert batch.pred_mask[batch.gt_label.bool()].flatten(1).any(1).all()


def test_predict_a_folder(dataset_path: Path, project_path: Path, checkpoint: Path) -> None:
    model, _, engine = objects(dataset_path, project_path)
    batches = engine.predict(model=model, ckpt_path=checkpoint, data_path=dataset_path / "dummy/test/bad")
    assert [bool(label) for b in batches for label in b.pred_label] == [True] * 4


@pytest.mark.parametrize("export_type", list(ExportType))
def test_export(dataset_path: Path, project_path: Path, checkpoint: Path, export_type: ExportType) -> None:
    model, _, engine = objects(dataset_path, project_path)
    path = engine.export(model=model, ckpt_path=checkpoint, export_type=export_type)
    assert path.stat().st_size > 1000
