"""Exports against the model in torch: ONNX Runtime, OpenVINO in FP32 and FP16, the pickled module."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from PIL import Image

import anomalib_wtflow
from anomalib_wtflow import WTFlow
from anomalib_wtflow.conformal import Scores, conformal_threshold
from anomalib_wtflow.deploy.exports import calibration_images, range_images
from anomalib_wtflow.deploy.quantization import CONVOLUTIONS, count_convolutions, keep_precise
from anomalib_wtflow.deploy.thresholds import placed, score_images
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.fit import fit_background
from anomalib_wtflow.images import mark_of

pytestmark = pytest.mark.slow

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
FIELDS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")


@pytest.fixture(scope="session")
def exported(trained: SimpleNamespace) -> SimpleNamespace:
    root = trained.root / "exports"
    return SimpleNamespace(
        onnx=trained.model.to_onnx(root),
        openvino=trained.model.to_openvino(root / "fp32"),
        fp16=trained.model.to_openvino(root / "fp16", compression_type=CompressionType.FP16),
        torch=trained.model.to_torch(root),
    )


@pytest.fixture(scope="session")
def images(trained: SimpleNamespace) -> list[Path]:
    """One good and one defective image of each kind."""
    root = Path(trained.parts.root)
    return [root / f"test/{name}/001.png" for name in ("good", "scratch", "stain", "missing")]


def as_batch(paths: list[Path]) -> np.ndarray:
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths]
    return np.stack(pixels).transpose(0, 3, 1, 2)


def in_torch(trained: SimpleNamespace, batch: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in trained.model(torch.from_numpy(batch))._asdict().items()}


def run_onnx(path: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: batch}), strict=True))


def compare(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(got[name], expected[name], atol=tolerance, rtol=0, err_msg=name)
    clear = np.abs(expected["pred_score"] - 0.5) > tolerance
    assert (got["pred_label"].astype(bool) == expected["pred_label"])[clear].all()
    clear = np.abs(expected["anomaly_map"] - 0.5) > tolerance
    assert (got["pred_mask"].astype(bool) == expected["pred_mask"])[clear].all()


def test_onnx(trained: SimpleNamespace, exported: SimpleNamespace, images: list[Path]) -> None:
    """The resize is in the graph: height, width and batch size are free."""
    shapes = ((2, 3, 200, 300), (1, 3, 64, 64), (2, 3, 517, 131))
    noise = [np.random.default_rng(0).random(shape, dtype=np.float32) for shape in shapes]
    for batch in (as_batch(images[:1]), as_batch(images), *noise):
        got = run_onnx(exported.onnx, batch)
        assert got["anomaly_map"].shape == (len(batch), 1, 128, 128)
        compare(got, in_torch(trained, batch))


@pytest.mark.parametrize(("kind", "tolerance"), [("torch", 1e-4), ("openvino", 1e-4), ("fp16", 5e-3)])
def test_anomalibs_inferencers(
    trained: SimpleNamespace,
    exported: SimpleNamespace,
    images: list[Path],
    kind: str,
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINO's writes its cache where it runs
    path = getattr(exported, kind)
    inferencer = TorchInferencer(path, "cpu") if kind == "torch" else OpenVINOInferencer(path, "CPU", config=F32)
    for image in images:
        expected, result = in_torch(trained, as_batch([image])), inferencer.predict(image)
        compare({f: np.asarray(getattr(result, f)).reshape(expected[f].shape) for f in FIELDS}, expected, tolerance)


def fit_statistics(model: WTFlow, images: torch.Tensor, index: torch.Tensor | None = None) -> None:
    """All but the field, which keeps its first weights; the thresholds are drawn."""
    batch = (model.model.extract(images), torch.zeros(len(images), dtype=torch.int64) if index is None else index)
    model.model.normalization.fit([batch])
    model.model.recognizer.fit([batch])
    fit_background(model.model, model.model.normalise(batch[0])[0], batch[1], images.shape[-2:])
    count = int(batch[1].max()) + 1
    model.post_processor.calibrate(Scores(torch.rand(len(images)), torch.rand(len(images)), batch[1]), count)


@pytest.mark.parametrize(("network", "solver"), [("pointwise", "rk4"), ("unet", "midpoint")])
def test_other_choices_export(network: str, solver: str, tmp_path: Path) -> None:
    """Solver, map, smoothing: the graph of a model fitted on noise agrees with torch."""
    overrides = {"network": network, "width": 16, "solver": solver, "anomaly_map": "relative", "sigma": 8.0}
    model = WTFlow(layers=["blocks.2"], image_size=(96, 80), overrides=overrides).eval()
    fit_statistics(model, torch.randn(4, 3, 96, 80))
    batch = np.random.default_rng(0).random((2, 3, 96, 80), dtype=np.float32)
    got = run_onnx(model.to_onnx(tmp_path), batch)
    compare(got, in_torch(SimpleNamespace(model=model), batch))


@pytest.mark.parametrize(
    ("backbone", "layers", "image_size"),
    [
        ("convnext_atto", ["stages.0", "stages.1"], 64),
        ("swin_tiny_patch4_window7_224", ["layers.1"], (64, 96)),
        ("vit_small_patch14_reg4_dinov2", ["blocks.1"], 70),
        ("vit_small_patch16_dinov3", ["blocks.1"], 64),
        ("cait_xxs24_224", ["blocks.1"], 64),
    ],
)
def test_each_kind_of_backbone_exports(backbone: str, layers: list[str], image_size: object, tmp_path: Path) -> None:
    """With random weights, fitted on noise, in ONNX Runtime and OpenVINO; the blocks behind the layers are cut off."""
    model = WTFlow(backbone, layers, pre_trained=False, image_size=image_size, overrides={"width": 16}).eval()
    size = model.pre_processor.transform.transforms[0].size
    fit_statistics(model, torch.randn(4, 3, *size))
    batch = np.random.default_rng(0).random((2, 3, 75, 60), dtype=np.float32)
    expected = in_torch(SimpleNamespace(model=model), batch)
    onnx = model.to_onnx(tmp_path, verbose=False)
    compare(run_onnx(onnx, batch), expected)
    # What `to_openvino` does, without a second export to ONNX.
    path = tmp_path / "model.xml"
    openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)
    keep_precise(path, count_convolutions(model.model.feature_extractor))
    result = openvino.compile_model(path, "CPU", F32)(batch)
    compare({name: result[name] for name in FIELDS}, expected)


def test_an_untrained_model_does_not_export(tmp_path: Path) -> None:
    with pytest.raises(WTFlowError, match="There is no threshold: train the model, or load a trained checkpoint"):
        WTFlow(image_size=64).to_onnx(tmp_path)


@pytest.fixture(scope="session")
def int8(trained: SimpleNamespace) -> dict[str, Path]:
    """Exports in 8 bits, with the data module of the training."""
    return {
        kind.name: trained.model.to_openvino(
            trained.root / kind.name, compression_type=kind, datamodule=trained.parts
        )
        for kind in (CompressionType.INT8, CompressionType.INT8_PTQ)
    }  # fmt: skip


def test_int8_keeps_stem_and_tail_in_float(trained: SimpleNamespace, int8: dict[str, Path]) -> None:
    """The backbone's convolutions behind the third have 8-bit weights and inputs; no sum, flow or score has."""
    operations = openvino.Core().read_model(int8["INT8_PTQ"]).get_ordered_ops()
    convolutions = [op.get_friendly_name() for op in operations if op.get_type_name() in CONVOLUTIONS]
    backbone = sum(isinstance(m, torch.nn.Conv2d) for m in trained.model.model.feature_extractor.network.modules())
    assert len(convolutions) > backbone + 3
    sources = {
        op.get_friendly_name(): [each.get_source_output().get_node().get_type_name() for each in op.inputs()]
        for op in operations
    }
    quantized = [name for name, types in sources.items() if "FakeQuantize" in types]
    assert sorted(quantized) == sorted(convolutions[3:backbone])
    weights = [
        op for op in operations if op.get_type_name() == "Constant" and op.get_element_type().to_string() == "i8"
    ]
    assert len(weights) == len(quantized)


@pytest.mark.parametrize("kind", ["openvino", "fp16"])
def test_the_stem_stays_precise(exported: SimpleNamespace, kind: str) -> None:
    """Where a runtime computes in bfloat16, the first three convolutions are in f32 and no others; else all are."""
    core = openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    precisions = {}
    for hint in ("f32", "bf16"):
        compiled = core.compile_model(getattr(exported, kind), "CPU", {"INFERENCE_PRECISION_HINT": hint})
        infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
        # The primitive's name ends in what it computes in; "runtimePrecision" is that of the weights.
        precisions[hint] = [
            info["primitiveType"].astype(str).rpartition("_")[2]
            for info in infos
            if info["layerType"].astype(str) == "Convolution"
        ]
    assert precisions["bf16"][:3] == ["f32"] * 3
    assert set(precisions["bf16"][3:]) == {"bf16"}
    assert set(precisions["f32"]) == {"f32"}


def metadata(path: Path) -> dict[str, str]:
    """Read as a user would, without the package."""
    if path.suffix == ".onnx":
        import onnx

        properties = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
        return {key.removeprefix("anomalib_wtflow."): value for key, value in properties.items()}
    return {k: v.astype(str) for k, v in openvino.Core().read_model(path).get_rt_info()["anomalib_wtflow"].items()}


@pytest.mark.parametrize("kind", ["onnx", "openvino", "fp16"])
def test_an_export_says_what_it_is(trained: SimpleNamespace, exported: SimpleNamespace, kind: str) -> None:
    post = trained.model.post_processor
    assert metadata(getattr(exported, kind)) == {
        "model": "WTFlow",
        "version": anomalib_wtflow.__version__,
        "precision": "FP16" if kind == "fp16" else "FP32",
        "backbone": "tf_efficientnet_lite0",
        "layers": "null",
        "false_alarm_rate": "0.1",
        "promised_false_alarm_rate": json.dumps(post.effective_false_alarm_rate.tolist()),
        "threshold": json.dumps(post.image_threshold.tolist()),
        "pixel_threshold": json.dumps(post.pixel_threshold.tolist()),
        "calibration_images": "[10]",
    }


def test_scores_through_a_graph_are_the_models(tmp_path: Path) -> None:
    """Of two products, and of an image of neither, whose score is infinite: INT8's thresholds come from them."""
    model, index = WTFlow(image_size=64, overrides={"width": 16}).eval(), torch.tensor([0, 1] * 6)
    model.model.set_products(2)
    images = (torch.rand(2, 3, 64, 64)[index] + 0.05 * torch.randn(12, 3, 64, 64)).clamp(0, 1)
    fit_statistics(model, model.pre_processor.transform(images), index)
    images[0] = 0
    with placed(model.post_processor):
        graph = openvino.convert_model(model.to_onnx(tmp_path))
    got = score_images(graph, (image[None].numpy() for image in images), 2)
    with torch.no_grad():
        result = model.model(model.pre_processor.transform(images))
    peaks = result.anomaly_map.flatten(1).amax(dim=1)
    torch.testing.assert_close(got, Scores.of(result.pred_score, peaks, result.recognition), rtol=1e-4, atol=1e-4)
    assert got.score.isinf().tolist() == [True] + [False] * 11


@pytest.mark.parametrize("kind", ["INT8_PTQ", "INT8"])
def test_int8_has_thresholds_of_its_own(
    trained: SimpleNamespace, exported: SimpleNamespace, int8: dict[str, Path], kind: str
) -> None:
    """Through the quantised graph, as the formula says: no calibration image is above the largest of ten scores."""
    facts, ready = metadata(int8[kind]), openvino.compile_model(int8[kind], "CPU", F32)
    assert facts["precision"] == kind
    held = [*calibration_images(trained.parts, trained.model.marks["calibration"], 10)]
    assert json.loads(facts["calibration_images"]) == [len(held)] == [10]
    results = [ready(image) for image in held]
    for field, name in (("pred_score", "threshold"), ("anomaly_map", "pixel_threshold")):
        t, old = (json.loads(each[name])[0] for each in (facts, metadata(exported.openvino)))
        n = torch.tensor([float(result[field].max()) for result in results], dtype=torch.float64)
        assert t == pytest.approx(float(conformal_threshold(t * n / (1 - n), 0.1).threshold), rel=1e-5)
        assert float(n.max()) == pytest.approx(0.5, abs=1e-5)
        assert 0 < abs(t / old - 1) < 0.2


def test_int8_takes_other_images_for_its_ranges(trained: SimpleNamespace) -> None:
    """Training images that no threshold comes from: all of the 16, since this one comes from validation images."""
    marks = trained.model.marks["calibration"]
    good = trained.parts.val_data.samples.query("label_index == 0")["image_path"]
    assert sorted(map(mark_of, good)) == marks.tolist()
    training = [mark_of(path) for path in trained.parts.train_data.samples["image_path"]]
    assert len(range_images(trained.parts, marks)) == 16
    assert len(range_images(trained.parts, torch.tensor(training[3:9]))) == 10
    held = [*calibration_images(trained.parts, torch.tensor(training[3:5]), 2)]
    for image, index in zip(held, (3, 4), strict=True):
        assert (image[0] == trained.parts.train_data[index].image.numpy()).all()


def test_int8_refuses_other_images_than_the_thresholds_come_from(trained: SimpleNamespace, tmp_path: Path) -> None:
    """As after ``calibrate``, whose thresholds the export would otherwise undo."""
    model = WTFlow.load_from_checkpoint(trained.checkpoint).eval()
    threshold = model.post_processor.image_threshold.clone()
    model.marks["calibration"] = torch.cat([model.marks["calibration"][1:], torch.tensor([7])])
    with pytest.raises(WTFlowError, match="The thresholds come from 10 images, of which this data has 9, so the rate"):
        model.to_openvino(tmp_path, compression_type=CompressionType.INT8, datamodule=trained.parts)
    assert torch.equal(model.post_processor.image_threshold, threshold)  # no placeholder is left behind
    assert not list(tmp_path.rglob("*.xml"))


def test_int8_without_data_keeps_the_thresholds_and_warns(trained: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="INT8 moves the scores, and the thresholds stay as they were: give it --data"):
        path = trained.model.to_openvino(tmp_path, compression_type=CompressionType.INT8)
    facts = metadata(path)
    assert json.loads(facts["threshold"]) == trained.model.post_processor.image_threshold.tolist()
    assert "promised_false_alarm_rate" not in facts
