"""Diagnosis of a trained model: numbers against anomalib's, the page against what it promises."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn import diagnosed, model_of, scored, write_images
from PIL import Image

from anomalib_wtflow import diagnose
from anomalib_wtflow.diagnosis.flow_numbers import flow_numbers
from anomalib_wtflow.diagnosis.measures import radius
from anomalib_wtflow.diagnosis.scoring import informative_first, score_image
from anomalib_wtflow.diagnosis.without_flow import POSITION_MEANS, UNWHITENED, WHITENED
from conftest import quiet_engine

FIGURES = ("scores", "kinds", "radius", "centripetal", "field", "pixels")


def check_page(page: Path) -> dict:
    """The page holds each figure and refers to nothing outside; returns the numbers."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text
    assert text.count("data:image/png;base64,") == len(FIGURES)
    for name in FIGURES:
        with Image.open(page.parent / f"{name}.png") as picture:
            assert min(picture.size) > 200
    return json.loads((page.parent / "numbers.json").read_text())


# A trained model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("diagnosis")
    return check_page(
        diagnose(trained.checkpoint, trained.parts, output, flow_images=4, control=True, device="cpu", progress=False)
    )


@pytest.mark.slow
def test_scores_are_those_of_the_engine(numbers: dict, trained: SimpleNamespace) -> None:
    scores, engine = numbers["scores"], quiet_engine(trained.root)
    (metrics,) = engine.test(trained.model, datamodule=trained.parts)
    assert scores["image_auroc"] == pytest.approx(metrics["image_AUROC"], abs=1e-5)
    assert scores["pixel_auroc"] == pytest.approx(metrics["pixel_AUROC"], abs=1e-5)
    post_processor = trained.model.post_processor
    assert scores["threshold"] == pytest.approx(float(post_processor.image_threshold), rel=1e-5)
    assert scores["promised_rate"] == pytest.approx(float(post_processor.effective_false_alarm_rate), rel=1e-5)
    assert scores["calibration_images"] == post_processor.calibration_images.item()
    batches = engine.predict(trained.model, dataloaders=trained.parts.test_dataloader())
    items = [item for batch in batches for item in batch]
    assert scores["false_alarms"] + scores["misses"] == sum(bool(i.pred_label) != bool(i.gt_label) for i in items)
    defective = sum(bool(item.gt_label) for item in items)
    assert scores["images"] == {"normal": len(items) - defective, "anomalous": defective}
    for level in ("image", "pixel"):
        for kind in ("normal", "anomalous"):
            assert sum(scores[f"{level}_histogram"][kind]) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_control_is_there(numbers: dict) -> None:
    """Plain rFM beside the trained field, and the three controls without a flow."""
    assert set(numbers["flow"]["ode"]) == set(numbers["field"]["couplings"]) == {"worst_of_two", "independent"}
    assert list(numbers["scores"]["controls"]) == [UNWHITENED, WHITENED, POSITION_MEANS]
    for kind in ("normal", "anomalous"):
        starts = [rows[kind]["radius"]["median"][0] for rows in numbers["flow"]["ode"].values()]
        assert starts == [numbers["flow"]["scored"][kind]["radius"]["median"][0]] * 2
    assert all(value > 0 for row in numbers["field"]["couplings"].values() for value in row["lipschitz"])


@pytest.mark.slow
def test_positions_that_are_followed(trained: SimpleNamespace) -> None:
    """All of good images, and of defective ones those half of whose pixels lie under the defect."""
    trained.parts.setup()
    model, data = trained.model, trained.parts.test_data
    images = [score_image(model, data[k]) for k in range(len(data))]
    good = [image for image in images if image.kind == "normal"][:3]
    bad = [image for image in images if image.kind == "anomalous"]
    flow = flow_numbers(model, {"worst_of_two": model.model.field}, {"normal": good, "anomalous": bad})
    shares = torch.stack([image.mask for image in bad]).float().unfold(1, 16, 16).unfold(2, 16, 16).mean(dim=(3, 4))
    assert flow["positions"] == {"normal": 3 * 8 * 8, "anomalous": int((shares > 0.5).sum())}  # stride 16
    with torch.no_grad():
        x0 = torch.stack([image.x0 for image in good])
        ends = radius(model.model.flow(x0, torch.zeros(3, dtype=torch.int64)))
    assert flow["scored"]["normal"]["radius"]["median"][-1] == pytest.approx(float(ends.median()), rel=0.02)


@pytest.mark.slow
def test_images_without_labels(trained: SimpleNamespace, tmp_path: Path) -> None:
    trained.parts.prepare_data()
    folder = Path(trained.parts.root) / "test" / "missing"
    numbers = check_page(diagnose(trained.checkpoint, folder, tmp_path, flow_images=2, control=True, progress=False))
    assert numbers["scores"]["images"] == {"unlabelled": 4}
    assert numbers["scores"]["strongest_control"] is None
    assert numbers["scores"]["image_auroc"] is None
    assert set(numbers["flow"]["ode"]) == {"worst_of_two"}  # no good images to train plain rFM on


# By hand -------------------------------------------------------------------------------------------------------------


def test_informative_first() -> None:
    """Wrong ones by distance from the threshold, each kind in turn, then right ones, the closest first."""
    images = [
        scored("scratch/found-surely", True, 9),
        scored("scratch/found-closely", True, 1.1),
        scored("good/passed", False, 0.9),
        scored("good/alarm-small", False, 1.2),
        scored("good/alarm-big", False, 3),
        scored("scratch/miss-near", True, 0.9),
        scored("scratch/miss-far", True, 0.2),
        scored("stain/miss", True, 0.8),
    ]
    names = [Path(image.path).name for image in informative_first(images, [1.0])]
    assert names == [
        *("miss-far", "miss", "alarm-big", "miss-near", "alarm-small"),
        *("found-closely", "passed", "found-surely"),
    ]
    unlabelled = [scored(f"{score}", None, score) for score in (0.5, 3, 1)]
    assert [image.score for image in informative_first(unlabelled, [1.0])] == [3, 1, 0.5]
    without = [scored(f"good/{score}", False, score, threshold=None) for score in (0.5, 3, 1)]
    assert [image.score for image in informative_first(without, [None])] == [3, 1, 0.5]


def test_text_is_escaped_and_names_need_be_no_utf8(tmp_path: Path) -> None:
    (image,) = write_images(tmp_path, [("a < b & c", 2.0, 0)])
    odd = Path(image.path).with_name(os.fsdecode(b"x_\xff.png"))
    Path(image.path).rename(odd)
    page = diagnosed(tmp_path / "page", model_of([1.0]), [image._replace(path=str(odd))])
    text = page.read_text("utf-8")
    assert "a &lt; b &amp; c" in text
    assert "a < b" not in text
    assert "model &lt;1&gt;.ckpt" in text
    assert "<i>" not in text
    assert r"a &lt; b &amp; c/x_\udcff.png</code>" in text
    assert json.loads((page.parent / "numbers.json").read_text())["images"][0]["file"] == "a < b & c/x_\udcff.png"
