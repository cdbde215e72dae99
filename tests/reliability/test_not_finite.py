"""NaN and infinity at every stage: an error in Python, anomalous in every export, never normal."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from ready import SIDE, drawn, ready
from torch import Tensor, nn

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.diagnosis.scoring import score_images as diagnosed
from anomalib_wtflow.features import backbone
from anomalib_wtflow.post_processor import Scored
from anomalib_wtflow.training.calibration import score_images as calibrated
from conftest import quiet_engine

VALUES = (math.nan, math.inf, -math.inf)
Change = Callable[[Tensor], Tensor]


class Stage:
    """A module whose output, or the part of it in a place, is made wrong, and how the error calls it."""

    def __init__(self, said: str, module: Callable[[WTFlow], nn.Module], part: int = 0) -> None:
        self.said, self.module, self.part = said, module, part


STAGES = {
    "pre-processed image": Stage("pixels", lambda model: model.pre_processor.transform),
    **{
        f"layer {place}": Stage(
            rf"features of layer 'blocks.{block}'", lambda model: model.model.feature_extractor.network, place
        )
        for place, block in enumerate((1, 2, 4))
    },
    "stacked features": Stage(r"features of layer 'blocks.\d'", lambda model: model.model.feature_extractor),
    "recognition": Stage("distances from the known products", lambda model: model.model.recognition, 1),
    "normalised features": Stage("normalised features", lambda model: model.model.normalization),
    "velocity": Stage("velocities of the field", lambda model: model.model.flow_field),
    "map": Stage("values of the anomaly map", lambda model: model.model.anomaly_map_generator, 0),
    "score": Stage("scores", lambda model: model.model.anomaly_map_generator, 1),
}


def spoil(image: int, value: float, values: Tensor) -> Tensor:
    """Make one number of one image of a batch wrong."""
    flat = values.flatten(1) if values.ndim > 1 else values[:, None]
    count, numbers = flat.shape  # not `len`, which would fix the batch size of an export
    here = (torch.arange(count) == image)[:, None] & (torch.arange(numbers) == numbers // 2)
    return torch.where(here, value, flat).view(values.shape)


def hook(part: int, change: Change, module: nn.Module, inputs: Any, output: Any) -> Any:
    """Change the output of a module, or a part of it; a module's function, so that exports can pickle it."""
    if isinstance(output, Tensor):
        return change(output)
    parts = [change(each) if place == part else each for place, each in enumerate(output)]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def break_at(model: WTFlow, stage: str, change: Change) -> Any:
    return STAGES[stage].module(model).register_forward_hook(partial(hook, STAGES[stage].part, change))


# Exports --------------------------------------------------------------------------------------------------------------


def broken_images() -> tuple[list[tuple[str, float]], np.ndarray]:
    """What is wrong with which image of a batch, and the batch: the last image is whole, the first three are not."""
    wrong = [(stage, value) for stage in ("image", *STAGES) for value in VALUES]
    batch = drawn(range(40, 41)).repeat(len(wrong) + 1, 1, 1, 1)
    for place, value in enumerate(VALUES):
        batch[place, 1, 30, 33] = value
    return wrong, batch.numpy()


def run_torch(path: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    model = torch.load(path, weights_only=False)["model"].eval()
    with torch.no_grad():
        return {name: values.numpy() for name, values in model(torch.from_numpy(batch))._asdict().items()}


def run_onnx(path: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: batch}), strict=True))


def run_openvino(graph: Any, batch: np.ndarray) -> dict[str, np.ndarray]:
    import openvino

    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(batch)
    return {output.get_any_name(): results[output] for output in compiled.outputs}


@pytest.fixture(scope="module", params=[1, 2], ids=["one product", "two products"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model in which each stage breaks other images of a batch, exported with all of it."""
    import openvino

    root, model = tmp_path_factory.mktemp("broken"), ready(request.param)
    wrong, batch = broken_images()
    for place, (stage, value) in enumerate(wrong):
        if stage == "pre-processed image":  # exports have a transform of their own
            model.pre_processor.register_forward_hook(partial(hook, 0, partial(spoil, place, value)))
        elif stage != "image":
            break_at(model, stage, partial(spoil, place, value))
    onnx = model.to_onnx(root)
    graph = openvino.convert_model(onnx)
    return SimpleNamespace(torch=model.to_torch(root), onnx=onnx, graph=graph, wrong=wrong, batch=batch, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino", "int8"])
def test_exports_call_it_anomalous(exported: SimpleNamespace, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the score 1; what is wrong with an image leaves the others alone; no output is NaN or infinite."""
    from anomalib_wtflow.deploy.quantization import count_convolutions, quantize

    monkeypatch.setattr(backbone, "CHUNK", len(exported.batch))  # hooks in the backbone count the images of a batch
    if runtime == "torch":
        result = run_torch(exported.torch, exported.batch)
    elif runtime == "onnx":
        result = run_onnx(exported.onnx, exported.batch)
    else:
        graph = exported.graph.clone()
        if runtime == "int8":
            images = [image[None].numpy() for image in drawn(range(40, 44))]
            graph = quantize(graph, images, count_convolutions(exported.model.model.feature_extractor))
        result = run_openvino(graph, exported.batch)
    labels, scores = result["pred_label"].ravel().astype(bool), result["pred_score"].ravel()
    passed = [
        what
        for what, label, score in zip(exported.wrong, labels[:-1], scores[:-1], strict=True)
        if not label or score != 1
    ]
    assert not passed
    assert not labels[-1]
    assert scores[-1] < 0.5
    assert all(np.isfinite(values).all() for values in result.values())
    maps = [place for place, (stage, _) in enumerate(exported.wrong) if stage == "map"]
    pixels, masks = result["anomaly_map"][maps, 0], result["pred_mask"][maps, 0].astype(bool)
    assert (pixels[:, SIDE // 2, 0] == 1).all()
    assert (masks.reshape(len(maps), -1).sum(axis=1) == 1).all()


def floats(model: WTFlow) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in model.model.state_dict().items() if tensor.is_floating_point())


def backbone_weight(model: WTFlow) -> str:
    return next(name for name, tensor in floats(model) if name.startswith("feature_extractor") and tensor.ndim == 4)


@pytest.mark.parametrize("products", [1, 2])
def test_every_weight_and_statistic_is_looked_at(products: int) -> None:
    """Infinite limits that do not hold are the only exceptions."""
    model, passed = ready(products), set()
    model.raise_for_broken_weights()
    for name, tensor in floats(model):
        if tensor.numel():
            for value in VALUES:
                first = (0,) * tensor.ndim
                kept = tensor[first].clone()
                tensor[first] = value
                passed |= {(name, value)} if model.model.broken_tensor() != name else set()
                tensor[first] = kept
    limits = {("anomaly_map_generator.limit", math.inf)}
    assert passed == (limits | {("recognition.limit", math.inf)} if products == 1 else limits)


@pytest.mark.parametrize("value", VALUES)
def test_broken_models_are_not_exported(tmp_path: Path, value: float) -> None:
    """A backbone's activations would hide a weight that is infinite: the features come out finite, and wrong."""
    model = ready(2)
    model.post_processor.enable_threshold_matching = False  # else anomalib takes one for the other
    thresholds = {"post_processor._image_threshold", "post_processor._pixel_threshold"}
    weights = {"model.recognition.centroids", "model.normalization.mean", "model.codes", "model.recognition.limit"}
    for name in sorted(thresholds | weights | {f"model.{backbone_weight(model)}"}):
        tensor = model.state_dict()[name]
        kept = tensor.clone()
        tensor[(-1,) * tensor.ndim] = value
        words = "There is no threshold" if name in thresholds else rf"^'{name.removeprefix('model.')}' of the model is"
        for export in (model.to_torch, model.to_onnx, model.to_openvino):
            with pytest.raises(ValueError, match=words):
                export(tmp_path)
        tensor.copy_(kept)
    assert not list(tmp_path.rglob("*.*"))


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> SyntheticParts:
    """Two good test images and one of each defect; validation has the same."""
    root = tmp_path_factory.mktemp("parts")
    sizes = {"train_images": 6, "test_images": 2, "defect_images": 1, "side": SIDE}
    parts = SyntheticParts(root, **sizes, val_split_mode="same_as_test", eval_batch_size=2)
    parts.prepare_data()
    return parts


@pytest.fixture(scope="module", params=[1, 2], ids=["one product", "two products"])
def model(request: pytest.FixtureRequest) -> WTFlow:
    return ready(request.param)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stage", STAGES)
def test_python_names_the_image_and_the_stage(
    model: WTFlow, parts: SyntheticParts, stage: str, value: float, tmp_path: Path
) -> None:
    """Whichever it is of, the backbone's layers with the others; the command takes turns."""
    commands = {
        math.nan: lambda engine: engine.test(model, datamodule=parts),
        math.inf: lambda engine: engine.validate(model, datamodule=parts),
        -math.inf: lambda engine: engine.predict(model, dataset=PredictDataset(parts.root / "test/good")),
    }
    handle = break_at(model, stage, partial(spoil, 0, value))
    try:
        said = rf"^The {STAGES[stage].said} of '.*\.png' are NaN or infinite \(1 such images in this batch\)"
        with pytest.raises(ValueError, match=said):
            commands[value](quiet_engine(tmp_path))
    finally:
        handle.remove()


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_python_refuses_broken_weights(parts: SyntheticParts, command: str, tmp_path: Path) -> None:
    """Also those that the features do not show: a ReLU6 makes 6 of infinity."""
    model = ready()
    name = backbone_weight(model)
    model.model.state_dict()[name][0, 0, 0, 0] = math.inf
    arguments = {"dataset": PredictDataset(parts.root / "test/good")} if command == "predict" else {"datamodule": parts}
    with pytest.raises(ValueError, match=f"^'{name}' of the model is NaN or infinite: load another checkpoint"):
        getattr(quiet_engine(tmp_path), command)(model, **arguments)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stage", ["pre-processed image", "layer 1"])
@pytest.mark.parametrize("normalization", ["whitening", "layer_norm"])
def test_training_names_the_image(
    parts: SyntheticParts, stage: str, normalization: str, value: float, tmp_path: Path
) -> None:
    """Before the first step, whatever the normalisation, which may need no fit."""
    model = WTFlow(image_size=SIDE, max_epochs=1, overrides={"width": 8, "normalization": normalization})
    break_at(model, stage, partial(spoil, 1, value))
    what = "pixels" if stage == "pre-processed image" else "features"
    with pytest.raises(ValueError, match=rf"^The {what} of '.*train/good/00\d.png' are NaN or infinite: check"):
        quiet_engine(tmp_path).fit(model, datamodule=parts)


def test_training_refuses_broken_weights(parts: SyntheticParts, tmp_path: Path) -> None:
    model = WTFlow(image_size=SIDE, max_epochs=1, overrides={"width": 8})
    name = backbone_weight(model)
    model.model.state_dict()[name][0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match=f"^'{name}' of the model is NaN or infinite"):
        quiet_engine(tmp_path).fit(model, datamodule=parts)


@pytest.mark.parametrize("score", [calibrated, lambda model, data: list(diagnosed(model, data, lambda rows, *_: rows))])
def test_calibrate_and_diagnose_name_the_image(parts: SyntheticParts, score: Any) -> None:
    model, data = ready(), PredictDataset(parts.root / "test/good")
    for value in VALUES:
        handle = break_at(model, "velocity", partial(spoil, 0, value))
        with pytest.raises(ValueError, match=r"^The velocities of the field of '.*000.png' are NaN or infinite"):
            score(model, data)
        handle.remove()


# Post-processing and metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
def test_anomalibs_threshold_does_not_pass_it(value: float) -> None:
    """``false_alarm_rate=None``: a score of NaN or -inf exceeds no threshold."""
    post = WTFlow(false_alarm_rate=None, image_size=SIDE).post_processor
    for name, number in (("image", 0.0), ("pixel", 0.0)):
        post.get_buffer(f"_{name}_threshold").fill_(number + 0.5)
        post.get_buffer(f"{name}_min").fill_(number)
        post.get_buffer(f"{name}_max").fill_(number + 1)
    maps = torch.full((2, 1, 2, 2), 0.1)
    maps[1, 0, 1, 1] = value
    result = post(Scored(torch.tensor([0.1, 0.1]), maps))
    assert result.pred_label.tolist() == [False, True]
    assert result.pred_score.tolist() == [pytest.approx(0.1), 1]
    assert result.pred_mask.flatten(1).sum(dim=1).tolist() == [0, 1]
    broken = post(Scored(torch.tensor([0.1, value]), maps[:1].repeat(2, 1, 1, 1)))
    assert broken.pred_label.tolist() == [False, True]


@pytest.mark.parametrize("value", VALUES)
def test_masks_and_labels_are_boolean_before_a_metric_sees_them(value: float) -> None:
    """anomalib's own: a wrong pixel of a mask counts as anomalous, a label that is no whole number is refused."""
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 2] = value
    batch = ImageBatch(image=torch.rand(1, 3, 4, 4), gt_mask=mask)
    assert batch.gt_mask.dtype == torch.bool
    assert batch.gt_mask.sum() == 1
    assert batch.gt_mask[0, 1, 2]
    with pytest.raises(ValueError, match="label"):
        ImageBatch(image=torch.rand(1, 3, 4, 4), gt_label=torch.tensor([value]))
