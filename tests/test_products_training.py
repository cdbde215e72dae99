"""One model for several products, through anomalib's Engine and its exports."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_wtflow import Products, SyntheticParts, WTFlow
from anomalib_wtflow.data.drawing import draw_part
from anomalib_wtflow.post_processor import conformal_threshold
from anomalib_wtflow.products import UNKNOWN
from anomalib_wtflow.reporting.product_report import report_of, tables
from anomalib_wtflow.training.calibration import Calibration, choose
from anomalib_wtflow.training.feature_caching import FEWEST, MOST, REFERENCE_IMAGES, references
from conftest import callback_of, quiet_engine

SMALL = {"image_size": 96, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0, "coupling": "worst_of_two"}}
NAMES = {"flange": 0, "pentagon": 1, "triangle": 4}


def drawn(root: Path, *names: str) -> Products:
    """Products of 15 training images and 6 + 3 x 2 test images."""
    sizes = {"train_images": 15, "test_images": 6, "defect_images": 2, "side": 96}
    options = {"root": root, "val_split_mode": "same_as_test", **sizes}
    return Products(members={name: SyntheticParts(product=NAMES[name], **options) for name in names}, name="plant")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of two products, tested."""
    root = tmp_path_factory.mktemp("two")
    data, model = drawn(root / "drawn", "flange", "pentagon"), WTFlow(max_epochs=4, **SMALL)
    engine = quiet_engine(root)
    engine.fit(model, datamodule=data)
    checkpoint, held = engine.best_model_path, set(callback_of(model, Calibration).data.samples["image_path"])
    results = engine.test(model, datamodule=data, ckpt_path=None)
    folder = Path(engine.trainer.default_root_dir)
    return SimpleNamespace(
        root=root, data=data, model=model.eval(), checkpoint=checkpoint, folder=folder, results=results[0], held=held
    )


def verdicts(model: WTFlow, data: Products) -> list[SimpleNamespace]:
    """What the model makes of each test image, one by one."""
    found = []
    for item in data.test_data:
        with torch.no_grad():
            raw = model.model(model.pre_processor(item.image[None]))
            result = model.post_processor(raw)
        found.append(
            SimpleNamespace(
                item=item,
                product=item.product,
                recognised=model.recognised(raw)[0],
                bad=bool(item.gt_label),
                raw=float(raw.pred_score),
                score=float(result.pred_score),
                label=bool(result.pred_label),
            )
        )
    return found


def test_products_are_named_and_recognised(two: SimpleNamespace) -> None:
    assert list(two.model.product_names) == ["flange", "pentagon"]
    assert all(each.recognised == each.product for each in verdicts(two.model, two.data))


def test_the_thresholds_are_conformal_for_each_product(two: SimpleNamespace) -> None:
    """Of three images each, which the field was not trained on."""
    raw: dict[str, list[torch.Tensor]] = {"flange": [], "pentagon": []}
    for member in two.data.members.values():
        member.setup()
    for name, member in two.data.members.items():
        for item in member.train_data:
            if item.image_path in two.held:
                raw[name].append(two.model.model(two.model.pre_processor(item.image[None])).pred_score)
    for place, (name, scores) in enumerate(raw.items()):
        assert len(scores) == 3, name
        expected = conformal_threshold(torch.cat(scores), 0.3)
        torch.testing.assert_close(
            two.model.post_processor.image_threshold[place], expected.threshold, rtol=1e-4, atol=1e-5
        )
        assert two.model.post_processor.effective_false_alarm_rate[place].item() == pytest.approx(0.25)


def test_the_report_is_that_of_the_predictions(two: SimpleNamespace) -> None:
    """By product, against scikit-learn; the mean is logged; nothing is mixed up."""
    report, found = json.loads((two.folder / "products.json").read_text()), verdicts(two.model, two.data)
    assert report["confusion"] == {"flange": {"flange": 12}, "pentagon": {"pentagon": 12}}
    for name, metrics in report["products"].items():
        own = [each for each in found if each.product == name]
        truth, labels = [each.bad for each in own], [each.label for each in own]
        assert metrics["good"] == metrics["anomalous"] == 6
        assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(truth, [each.score for each in own]), abs=1e-6)
        assert metrics["image_F1Score"] == pytest.approx(f1_score(truth, labels), abs=1e-6)
        assert metrics["false_alarms"] == sum(each.label and not each.bad for each in own)
        assert metrics["misses"] == sum(each.bad and not each.label for each in own)
        maps, masks = [], []
        for each in own:
            result = two.model(each.item.image[None])
            maps.append(result.anomaly_map.flatten())
            masks.append(each.item.gt_mask.flatten())
        expected = roc_auc_score(torch.cat(masks).numpy(), torch.cat(maps).detach().numpy())
        assert metrics["pixel_AUROC"] == pytest.approx(expected, abs=2e-3)  # in steps of 1/2000
    for name in ("image_AUROC", "image_F1Score", "pixel_AUROC", "recognised"):
        mean = np.mean([metrics[name] for metrics in report["products"].values()])
        assert report["mean"][name] == pytest.approx(mean)
        assert two.results[f"products_{name}"] == pytest.approx(mean, abs=1e-6)


def test_a_report_says_what_was_taken_for_what() -> None:
    """Images of a product whose good ones are missing have no AUROC, and no false alarms."""
    rows = [("a", "a", 0, 0.1, False), ("a", "b", 0, 0.7, True), ("a", "a", 1, 0.6, True), ("b", UNKNOWN, 1, 0.4, True)]
    report = report_of(rows)
    assert report["confusion"] == {"a": {"a": 2, "b": 1}, "b": {UNKNOWN: 1}}
    assert report["products"]["a"] == {
        "good": 2, "anomalous": 1, "recognised": 0.5, "image_AUROC": 0.5, "misses": 0, "false_alarms": 1,
        "image_F1Score": pytest.approx(2 / 3),
    }  # fmt: skip
    assert report["products"]["b"] == {
        "good": 0, "anomalous": 1, "recognised": 0.0, "image_F1Score": 1.0, "misses": 0
    }  # fmt: skip
    assert [table.title for table in tables(report)] == ["Products", "Products taken for another"]
    assert [table.title for table in tables(report_of(rows[:1]))] == ["Products"]


def test_pictures_lie_in_a_folder_for_each_product(two: SimpleNamespace) -> None:
    pictures = sorted(str(path.relative_to(two.folder / "images")) for path in two.folder.rglob("*.png"))
    assert len(pictures) == len(set(pictures)) == 24
    assert {Path(picture).parts[0] for picture in pictures} == {"flange", "pentagon"}
    assert len({str(Path(picture).parent) for picture in pictures}) == 2 * 4


def test_predictions_lie_in_a_folder_for_each_recognised_product(two: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name, product in (("a", 0), ("b", 1), ("c", 4)):
        Image.fromarray(draw_part(7, 96, product=product)[0]).save(folder / f"{name}.png")
    engine = quiet_engine(tmp_path)
    engine.predict(WTFlow.load_from_checkpoint(two.checkpoint), data_path=folder)
    pictures = {path.stem: path.parent.parent.name for path in (tmp_path / "WTFlow").rglob("*.png")}
    assert pictures == {"a": "flange", "b": "pentagon", "c": UNKNOWN}


def test_the_checkpoint_is_the_whole_model(two: SimpleNamespace) -> None:
    loaded = WTFlow.load_from_checkpoint(two.checkpoint).eval()
    assert list(loaded.product_names) == ["flange", "pentagon"]
    for one, other in zip(verdicts(loaded, two.data), verdicts(two.model, two.data), strict=True):
        assert (one.raw, one.score, one.label) == (other.raw, other.score, other.label)


def test_a_stranger_is_an_unknown_product(two: SimpleNamespace) -> None:
    """Good and defective images of a product that the model has never seen are anomalous, all of them."""
    stranger = drawn(two.root / "drawn", "triangle")
    stranger.prepare_data()
    stranger.setup()
    found = verdicts(two.model, stranger)
    assert {each.recognised for each in found} == {UNKNOWN}
    assert all(each.label and each.score > 0.5 for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_exports_judge_as_torch_does(two: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    """Images of each product, and of one that is like none; with no input but the image."""
    stranger = drawn(two.root / "drawn", "triangle")
    stranger.prepare_data()
    stranger.setup()
    images = [data.test_data[index].image for data in (two.data, stranger) for index in range(0, 12, 2)]
    batch = torch.stack([*images, *(two.data.test_data[index].image for index in range(12, 24, 3))])
    with torch.no_grad():
        expected = two.model(batch)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(two.model.to_onnx(tmp_path), providers=["CPUExecutionProvider"])
        assert len(session.get_inputs()) == 1
        names = [output.name for output in session.get_outputs()]
        got = dict(zip(names, session.run(None, {session.get_inputs()[0].name: batch.numpy()}), strict=True))
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
    assert got["pred_label"].astype(bool)[6:12].all()  # those of the stranger


@pytest.mark.slow
def test_int8_tells_products_and_strangers_apart(two: SimpleNamespace, tmp_path: Path) -> None:
    """With ranges from images of both products; who is unknown is told from features in 8 bits."""
    from anomalib.deploy import CompressionType

    from anomalib_wtflow.deploy.quantization import tail_names

    path = two.model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=two.data)
    import openvino

    graph = openvino.Core().read_model(path)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in two.model.model.feature_extractor.network.modules())
    tail = set(tail_names(graph, convolutions))
    assert not [op for op in graph.get_ordered_ops() if op.get_friendly_name() in tail and "Fake" in op.get_type_name()]
    ready = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    stranger = drawn(two.root / "drawn", "triangle")
    stranger.prepare_data()
    stranger.setup()
    for index in range(0, 12, 3):
        result = ready(stranger.test_data[index].image[None].numpy())
        assert bool(result["pred_label"][0])
    said = graph.get_rt_info()["anomalib_wtflow"]
    assert json.loads(said["products"].astype(str)) == list(two.model.product_names)
    thresholds, counts = (json.loads(said[k].astype(str)) for k in ("threshold", "calibration_images"))
    chosen = choose(two.data, two.model.settings.calibration_ratio).data
    places = [[*two.model.product_names].index(item.product) for item in chosen]
    assert counts == torch.bincount(torch.tensor(places)).tolist()
    normalised = torch.tensor([ready(item.image[None].numpy())["pred_score"].item() for item in chosen]).double()
    for place, threshold in enumerate(thresholds):
        n = normalised[torch.tensor(places) == place]
        expected = conformal_threshold(threshold * n / (1 - n), two.model.post_processor.false_alarm_rate).threshold
        assert threshold == pytest.approx(float(expected), rel=1e-5)
    own = [ready(item.image[None].numpy())["pred_score"].item() for item in two.data.test_data]
    exact = [each.score for each in verdicts(two.model, two.data)]
    assert np.corrcoef(own, exact)[0, 1] > 0.9


def test_a_product_is_added(two: SimpleNamespace, tmp_path: Path) -> None:
    """What is known of the others stays, bit by bit; their thresholds are set anew."""
    model = WTFlow(max_epochs=2, start_from=two.checkpoint, **SMALL)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    for name, tensor in model.model.field.state_dict().items():
        assert torch.equal(tensor, model.model.flow_field.state_dict()[name])
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=drawn(two.root / "drawn", "triangle", "flange", "pentagon"))
    assert list(model.product_names) == ["flange", "pentagon", "triangle"]
    after = model.model.state_dict()
    for name in ("recognition.centroids", "normalization.mean", "normalization.weight", "codes"):
        assert len(after[name]) == 3
        assert torch.equal(after[name][:2], before[name])
        assert not torch.equal(after[name][2], after[name][1])
    assert torch.equal(after["recognition.weight"], before["recognition.weight"])
    assert model.post_processor.image_threshold.shape == (3,)
    data = drawn(two.root / "drawn", "flange", "pentagon", "triangle")
    data.prepare_data()
    data.setup()
    assert all(each.recognised == each.product for each in verdicts(model.eval(), data) if not each.bad)
    again = WTFlow.load_from_checkpoint(engine.best_model_path)
    assert list(again.product_names) == ["flange", "pentagon", "triangle"]


def test_adding_needs_the_data_of_all(two: SimpleNamespace, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=1, start_from=two.checkpoint, **SMALL)
    with pytest.raises(ValueError, match="knows the product 'flange', which has no training images here"):
        quiet_engine(tmp_path).fit(model, datamodule=drawn(two.root / "drawn", "pentagon", "triangle"))


def test_what_a_training_does_not_start_from(two: SimpleNamespace) -> None:
    """What is no checkpoint of WTFlow at all, tests/reliability/test_ckpt.py tries."""
    with pytest.raises(ValueError, match=r"' was trained with start_time=0\.35"):
        WTFlow(start_from=two.checkpoint, **{**SMALL, "overrides": {**SMALL["overrides"], "start_time": 0.2}})


def test_a_resumed_training_has_the_same_products(two: SimpleNamespace, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=5, **SMALL)
    data = drawn(two.root / "drawn", "flange", "pentagon", "triangle")
    with pytest.raises(ValueError, match="The product 'triangle' is none of the model's"):
        quiet_engine(tmp_path).fit(model, datamodule=data, ckpt_path=two.checkpoint)


def test_one_product_is_the_simple_case(two: SimpleNamespace, tmp_path: Path) -> None:
    """A data module of one product gives what its images give by themselves, and is named after them."""
    alone, member = WTFlow(max_epochs=2, **SMALL), WTFlow(max_epochs=2, **SMALL)
    products = drawn(two.root / "drawn", "flange")
    plain = products.members["flange"]
    plain.train_batch_size = products.train_batch_size
    quiet_engine(tmp_path, limit_val_batches=0).fit(alone, datamodule=plain)
    quiet_engine(tmp_path, limit_val_batches=0).fit(member, datamodule=drawn(two.root / "drawn", "flange"))
    assert list(alone.product_names) == ["SyntheticParts"]
    assert list(member.product_names) == ["flange"]
    assert alone.model.recognition.limit.isinf()
    images = torch.stack([plain.test_data[index].image for index in range(12)])
    given, expected = alone.eval()(images), member.eval()(images)
    torch.testing.assert_close(given.pred_score, expected.pred_score, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.anomaly_map, expected.anomaly_map, rtol=0, atol=1e-6)
    assert torch.equal(given.pred_label, expected.pred_label)


@pytest.mark.parametrize(
    ("products", "each"), [(1, REFERENCE_IMAGES), (8, REFERENCE_IMAGES), (16, MOST // 16), (64, FEWEST)]
)
def test_reference_images_of_each_product(products: int, each: int) -> None:
    product = torch.arange(products).repeat(120)
    shown = list(range(len(product)))
    chosen = references(shown, product)
    assert torch.bincount(product[sorted(chosen)]).tolist() == [each] * products
    assert references(shown[:5], product) == set(shown[:5])
