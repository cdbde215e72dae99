"""The main job on real images, through the Engine and OpenVINO: bottles with the defaults, the rate on tiles."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.models import get_model
from lightning import seed_everything
from torchmetrics.functional.classification import binary_auroc

from anomalib_wtflow import WTFlow
from anomalib_wtflow.data.layout import mvtec_layout
from conftest import SHARED, quiet_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "mvtec_bottle").is_dir(), reason="the shared data sets are not on this machine"),
]


def test_bottle(tmp_path: Path) -> None:
    seed_everything(0)
    datamodule = MVTecAD(root=SHARED / "mvtec_bottle", category="bottle", num_workers=2)
    model = get_model("WTFlow")
    engine = quiet_engine(tmp_path)
    (metrics,) = engine.train(model, datamodule=datamodule)
    assert metrics["image_AUROC"] >= 0.99
    assert metrics["pixel_AUROC"] >= 0.97

    import openvino

    compiled = openvino.compile_model(model.to_openvino(tmp_path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores = [float(compiled(item.image[None].numpy())["pred_score"][0]) for item in raw_test_images()]
    labels = [int(item.gt_label) for item in raw_test_images()]
    auroc = binary_auroc(torch.tensor(scores), torch.tensor(labels)).item()
    assert auroc == pytest.approx(metrics["image_AUROC"], abs=1e-3)


def raw_test_images():
    """The test images as they lie on the disk, before any resize."""
    datamodule = MVTecAD(root=SHARED / "mvtec_bottle", category="bottle")
    datamodule.setup()
    return datamodule.test_data


def tile_images() -> Folder:
    return mvtec_layout(SHARED / "magnetic_tile", num_workers=0, val_split_mode="same_as_test")


@pytest.mark.parametrize("precision", ["FP32", "INT8_PTQ"])
def test_the_rate_holds_for_every_exported_precision(tiles: str, tmp_path: Path, precision: str) -> None:
    """Good tiles called anomalous, against the 99.9 % band of what the export's own metadata promises."""
    from json import loads

    import openvino
    from anomalib.deploy import CompressionType
    from scipy.stats import betabinom

    compression = None if precision == "FP32" else CompressionType[precision]
    data = tile_images()
    data.setup()
    model = WTFlow.load_from_checkpoint(tiles).eval()
    path = model.to_openvino(tmp_path, compression_type=compression, datamodule=data)
    said = {k: v.astype(str) for k, v in openvino.Core().read_model(path).get_rt_info()["anomalib_wtflow"].items()}
    (n,), (promised,) = loads(said["calibration_images"]), loads(said["promised_false_alarm_rate"])
    assert n == 132
    ready = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    good = [item for item in data.test_data if not item.gt_label]
    alarms = sum(bool(ready(item.image[None].numpy())["pred_label"][0]) for item in good)
    exceed = round(promised * (n + 1))
    low, high = betabinom.ppf([0.0005, 0.9995], len(good), exceed, n + 1 - exceed)
    assert low <= alarms <= high


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint of a model that has seen the tiles for a few epochs: enough for a rate."""
    engine = quiet_engine(tmp_path_factory.mktemp("tiles"))
    engine.fit(WTFlow(max_epochs=5, overrides={"plateau": 0.0}), datamodule=tile_images())
    return engine.best_model_path
