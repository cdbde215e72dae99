"""One model for several products, through anomalib's Engine and its exports."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_wtflow import Products, SyntheticParts, WTFlow
from anomalib_wtflow.conformal import conformal_threshold
from anomalib_wtflow.data.drawing import draw_part
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.images import mark_of
from anomalib_wtflow.products.recognition import UNKNOWN
from conftest import quiet_engine

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"image_size": 96, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0}}
NAMES = {"flange": 0, "pentagon": 1, "triangle": 4}
SIZES: dict[str, Any] = {"train_images": 15, "test_images": 6, "defect_images": 2, "side": 96}


def drawn(root: Path, *names: str, validation: str = "same_as_test") -> Products:
    """Products of 15 training images and 6 + 3 x 2 test images."""
    options = {"root": root / "drawn", "val_split_mode": validation, **SIZES}
    return Products(members={name: SyntheticParts(product=NAMES[name], **options) for name in names}, name="plant")


def fitted(root: Path, data: Any, **kwargs: Any) -> SimpleNamespace:
    model, engine = WTFlow(**{"max_epochs": 2, **SMALL, **kwargs}), quiet_engine(root)
    engine.fit(model, datamodule=data)
    return SimpleNamespace(root=root, data=data, model=model.eval(), checkpoint=engine.best_model_path)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("two")
    return fitted(root, drawn(root, "flange", "pentagon"))


def verdicts(model: WTFlow, data: Any) -> list[SimpleNamespace]:
    """What the model makes of each test image, one by one."""
    data.prepare_data()
    data.setup()
    found = []
    for item in data.test_data:
        with torch.no_grad():
            raw = model.model(model.pre_processor(item.image[None]))
            result = model.post_processor(raw)
        (recognised,) = raw.recognition.names(model.products)
        score, label = float(result.pred_score), bool(result.pred_label)
        found.append(
            SimpleNamespace(item=item, recognised=recognised, raw=float(raw.pred_score), score=score, label=label)
        )
    return found


def test_products_are_named_and_recognised(two: SimpleNamespace) -> None:
    assert two.model.products == ["flange", "pentagon"]
    assert all(each.recognised == each.item.product for each in verdicts(two.model, two.data))


def test_a_stranger_is_an_unknown_product(two: SimpleNamespace) -> None:
    """Good and defective images of a product that the model has never seen are anomalous, all of them."""
    found = verdicts(two.model, drawn(two.root, "triangle"))
    assert {each.recognised for each in found} == {UNKNOWN}
    assert all(each.label and each.score > 0.5 for each in found)


def test_the_thresholds_are_conformal_for_each_product(two: SimpleNamespace) -> None:
    """Of three images each, which the field was not trained on."""
    held, trained = (set(two.model.marks[kind].tolist()) for kind in ("calibration", "training"))
    assert (len(held), len(trained), held & trained) == (6, 24, set())
    scores: dict[str, list[torch.Tensor]] = {"flange": [], "pentagon": []}
    for item in two.data.train_data:
        if mark_of(item.image_path) in held:
            scores[item.product].append(two.model.model(two.model.pre_processor(item.image[None])).pred_score)
    post = two.model.post_processor
    for k, each in enumerate(scores.values()):
        assert len(each) == 3
        threshold, rate = conformal_threshold(torch.cat(each), 0.3)
        torch.testing.assert_close(post.image_threshold[k], threshold, rtol=1e-4, atol=1e-5)
        assert float(post.effective_false_alarm_rate[k]) == pytest.approx(rate)


def test_thresholds_from_validation_images_of_each_product(tmp_path: Path) -> None:
    """Of the score and of the largest pixel, where each product has enough good images to validate on."""
    run = fitted(tmp_path, drawn(tmp_path, "flange", "pentagon", validation="from_test"))
    normals = [item for item in run.data.val_data if item.gt_label == 0]
    for k, name in enumerate(run.model.products):
        with torch.no_grad():
            own = [item.image[None] for item in normals if item.product == name]
            raw = [run.model.model(run.model.pre_processor(image)) for image in own]
        assert len(raw) == 3
        post = run.model.post_processor
        for got, values in (
            (post.image_threshold, [each.pred_score for each in raw]),
            (post.pixel_threshold, [each.anomaly_map.max()[None] for each in raw]),
        ):
            expected = conformal_threshold(torch.cat(values), 0.3).threshold
            torch.testing.assert_close(got[k], expected, rtol=1e-4, atol=1e-5)
    assert len(run.model.marks["training"]) == 30


def test_masks_of_some_products_change_no_training(two: SimpleNamespace, tmp_path: Path) -> None:
    """Weights and thresholds come from good images; a test judges pixels where masks are, images everywhere."""
    for name, member in two.data.members.items():
        shutil.copytree(str(member.root), tmp_path / "plant" / name)
    shutil.rmtree(tmp_path / "plant" / "pentagon" / "ground_truth")
    data = Products(tmp_path / "plant", eval_batch_size=5)
    run = fitted(tmp_path, data)
    expected = two.model.state_dict()
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    engine = quiet_engine(tmp_path)
    (metrics,) = engine.test(run.model, datamodule=data, verbose=False)
    assert {"image_AUROC", "pixel_AUROC"} <= set(metrics)
    found = {each.item.image_path: each for each in verdicts(run.model.eval(), data)}
    batches = engine.predict(run.model, datamodule=data)
    for batch in batches:
        for path, score, product in zip(batch.image_path, batch.pred_score.tolist(), batch.product, strict=True):
            each = found.pop(path)
            assert score == pytest.approx(each.score, abs=1e-5)
            assert product == each.item.product
    assert not found


def test_the_checkpoint_is_the_whole_model(two: SimpleNamespace) -> None:
    loaded = WTFlow.load_from_checkpoint(two.checkpoint).eval()
    assert loaded.products == ["flange", "pentagon"]
    for kind, marks in two.model.marks.items():
        assert torch.equal(loaded.marks[kind], marks)
    for one, other in zip(verdicts(loaded, two.data), verdicts(two.model, two.data), strict=True):
        assert (one.raw, one.score, one.label) == (other.raw, other.score, other.label)


def test_predictions_of_a_plain_folder(two: SimpleNamespace, tmp_path: Path) -> None:
    """Images that nobody says the product of."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, product in (("a", 0), ("b", 1), ("c", 4)):
        Image.fromarray(draw_part(7, 96, product=product)[0]).save(folder / f"{name}.png")
    model = WTFlow.load_from_checkpoint(two.checkpoint, visualizer=False)
    batches = quiet_engine(tmp_path).predict(model, data_path=folder)
    names = [name for batch in batches for name in batch.recognition.names(model.products)]
    assert names == ["flange", "pentagon", UNKNOWN]


@pytest.mark.parametrize("kind", ["torch", "openvino"])
def test_exports_judge_as_torch_does(two: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Images of each product, and of none; with no input but the image."""
    stranger = drawn(two.root, "triangle")
    stranger.prepare_data()
    stranger.setup()
    images = [data.test_data[k].image for data in (two.data, stranger) for k in range(0, 12, 2)]
    batch = torch.stack([*images, torch.zeros(3, 96, 96), *(two.data.test_data[k].image for k in range(12, 24, 3))])
    with torch.no_grad():
        expected = two.model(batch)
    if kind == "torch":
        with torch.no_grad():
            result = torch.load(two.model.to_torch(tmp_path), weights_only=False)["model"].eval()(batch)
        got = {name: values.numpy() for name, values in result._asdict().items()}
    else:
        import openvino

        path = two.model.to_openvino(tmp_path)
        ready = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = ready(batch.numpy())
        got = {output.any_name: result[output] for output in ready.outputs}
    assert set(got) == {"pred_score", "pred_label", "anomaly_map", "pred_mask"}
    np.testing.assert_allclose(got["pred_score"], expected.pred_score.numpy(), atol=1e-4)
    np.testing.assert_allclose(got["anomaly_map"], expected.anomaly_map.numpy(), atol=1e-4)
    clear = (expected.pred_score - 0.5).abs().numpy() > 1e-4
    assert (got["pred_label"].astype(bool) == expected.pred_label.numpy())[clear].all()
    assert got["pred_label"].astype(bool)[6:13].all()  # those of none


def test_a_product_is_added(two: SimpleNamespace, tmp_path: Path) -> None:
    """What is known of the others stays, bit by bit; the images that were held out are held out again."""
    run = fitted(tmp_path, drawn(two.root, "triangle", "flange", "pentagon"), start_from=two.checkpoint)
    assert run.model.products == ["flange", "pentagon", "triangle"]
    before, after = two.model.model.state_dict(), run.model.model.state_dict()
    for name in ("recognizer.centroids", "normalization.mean", "normalization.weight", "class_embeddings"):
        assert len(after[name]) == 3
        assert torch.equal(after[name][:2], before[name])
        assert not torch.equal(after[name][2], after[name][1])
    assert torch.equal(after["recognizer.weight"], before["recognizer.weight"])
    assert run.model.post_processor.image_threshold.shape == (3,)
    held = set(run.model.marks["calibration"].tolist())
    assert len(held) == 9
    assert set(two.model.marks["calibration"].tolist()) <= held
    found = verdicts(run.model, drawn(two.root, "flange", "pentagon", "triangle"))
    assert all(each.recognised == each.item.product for each in found if not each.item.gt_label)
    assert WTFlow.load_from_checkpoint(run.checkpoint).products == run.model.products


def test_what_a_training_does_not_start_from(two: SimpleNamespace, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=1, start_from=two.checkpoint, **SMALL)
    with pytest.raises(WTFlowError, match="knows the product 'flange', which has no training images here"):
        quiet_engine(tmp_path).fit(model, datamodule=drawn(two.root, "pentagon", "triangle"))
    with pytest.raises(WTFlowError, match=r"trained with image_size=96 \(here 64\)"):
        WTFlow(start_from=two.checkpoint, **{**SMALL, "image_size": 64})


def test_one_product_is_the_simple_case(two: SimpleNamespace, tmp_path: Path) -> None:
    """A data module of one product gives what its images give by themselves, and is named after them."""
    products = drawn(two.root, "flange")
    plain = drawn(two.root, "flange").members["flange"]
    plain.train_batch_size = products.train_batch_size
    alone, member = fitted(tmp_path, plain).model, fitted(tmp_path, products).model
    assert (alone.products, member.products) == (["SyntheticParts"], ["flange"])
    expected = alone.state_dict()
    for name, tensor in member.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_anomalibs_threshold_is_one_for_all_products(two: SimpleNamespace, tmp_path: Path) -> None:
    run = fitted(tmp_path, drawn(two.root, "flange", "pentagon"), false_alarm_rate=None)
    assert run.model.post_processor.image_threshold.numel() == 1
    other = WTFlow.load_from_checkpoint(run.checkpoint).eval()
    images = torch.stack([run.data.test_data[k].image for k in range(0, 24, 4)])
    with torch.no_grad():
        for got, expected in zip(other(images), run.model(images), strict=True):
            assert torch.equal(got, expected)
