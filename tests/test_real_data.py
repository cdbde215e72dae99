"""The main job on real images: MVTec's bottles, with the defaults, through the Engine and OpenVINO."""

from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.models import get_model
from lightning import seed_everything
from torchmetrics.functional.classification import binary_auroc

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
