"""NaN and infinity at every stage: an error in Python, anomalous in every export, never normal."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch, PredictDataset
from ready import SIDE, drawn, ready
from torch import Tensor, nn

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.checkpoint import broken_tensors
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features import backbone
from conftest import quiet_engine

VALUES = (math.nan, math.inf, -math.inf)
Change = Callable[[Tensor], Tensor]


STAGES: dict[str, tuple[Callable[[WTFlow], nn.Module], int]] = {
    "pre-processed image": (lambda model: model.pre_processor.transform, 0),
    "first layer": (lambda model: model.model.feature_extractor.network, 0),
    "last layer": (lambda model: model.model.feature_extractor.network, 2),
    "stacked features": (lambda model: model.model.feature_extractor, 0),
    "distance": (lambda model: model.model.recognizer, 1),
    "normalised features": (lambda model: model.model.normalization, 0),
    "velocity": (lambda model: model.model.field, 0),
    "map": (lambda model: model.model.anomaly_map_generator, 0),
    "score": (lambda model: model.model.anomaly_map_generator, 1),
}
"""Modules whose output is made wrong, and the part of it."""


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
    module, part = STAGES[stage]
    return module(model).register_forward_hook(partial(hook, part, change))


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
@pytest.mark.parametrize("runtime", ["torch", "onnx", "openvino"])
def test_exports_call_it_anomalous(exported: SimpleNamespace, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the score 1; what is wrong with an image leaves the others alone; no output is NaN or infinite."""
    monkeypatch.setattr(backbone, "CPU_CHUNK", len(exported.batch))  # hooks in the backbone count the images of a batch
    if runtime == "torch":
        result = run_torch(exported.torch, exported.batch)
    elif runtime == "onnx":
        result = run_onnx(exported.onnx, exported.batch)
    else:
        result = run_openvino(exported.graph, exported.batch)
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


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", [1, 2])
def test_every_weight_and_statistic_is_looked_at(products: int) -> None:
    """Infinite limits that do not hold are the only exceptions."""
    state, passed = ready(products).model.state_dict(), set()
    assert not list(broken_tensors(state))
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            for value in VALUES:
                first = (0,) * tensor.ndim
                kept = tensor[first].clone()
                tensor[first] = value
                passed |= {(name, value)} if [*broken_tensors(state)] != [name] else set()
                tensor[first] = kept
    limits = {("anomaly_map_generator.limit", math.inf)}
    assert passed == (limits | {("recognizer.limit", math.inf)} if products == 1 else limits)


@pytest.mark.parametrize("name", ["post_processor._pixel_threshold", "model.recognizer.centroids"])
def test_broken_models_are_not_exported(tmp_path: Path, name: str) -> None:
    model = ready(2)
    tensor = model.state_dict()[name]
    tensor[(-1,) * tensor.ndim] = math.nan
    for export in (model.to_torch, model.to_onnx, model.to_openvino):
        with pytest.raises(WTFlowError):
            export(tmp_path)
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


@pytest.mark.parametrize("stage", STAGES)
def test_python_names_the_image(model: WTFlow, parts: SyntheticParts, stage: str, tmp_path: Path) -> None:
    """Whatever is wrong, and in each command."""
    good = PredictDataset(parts.root / "test/good")
    commands: list[tuple[float, Callable[[Any], Any]]] = [
        (math.nan, lambda engine: engine.test(model, datamodule=parts)),
        (math.inf, lambda engine: engine.validate(model, datamodule=parts)),
        (-math.inf, lambda engine: engine.predict(model, dataset=good)),
    ]
    for value, command in commands:
        handle = break_at(model, stage, partial(spoil, 0, value))
        try:
            with pytest.raises(WTFlowError, match=r"^The score of '.*\.png' has NaN or infinite values"):
                command(quiet_engine(tmp_path))
        finally:
            handle.remove()


@pytest.mark.parametrize("stage", ["pre-processed image", "first layer"])
@pytest.mark.parametrize("normalization", ["channel", "layer_norm"])
def test_training_names_the_image(parts: SyntheticParts, stage: str, normalization: str, tmp_path: Path) -> None:
    """Whatever the normalisation, which may need no fit."""
    for value in VALUES:
        model = WTFlow(image_size=SIDE, max_epochs=1, overrides={"width": 8, "normalization": normalization})
        break_at(model, stage, partial(spoil, 1, value))
        with pytest.raises(WTFlowError, match=r"^The features of '.*train/good/00\d.png' has NaN or infinite"):
            quiet_engine(tmp_path).fit(model, datamodule=parts)


@pytest.mark.parametrize("value", VALUES)
def test_anomalibs_threshold_does_not_pass_it(value: float) -> None:
    """``false_alarm_rate=None``: a score of NaN or -inf exceeds no threshold."""
    post = WTFlow(false_alarm_rate=None, image_size=SIDE).post_processor
    for name in ("image", "pixel"):
        post.get_buffer(f"_{name}_threshold").fill_(0.5)
        post.get_buffer(f"{name}_min").fill_(0)
        post.get_buffer(f"{name}_max").fill_(1)
    maps = torch.full((2, 1, 2, 2), 0.1)
    maps[1, 0, 1, 1] = value
    result = post(InferenceBatch(pred_score=torch.tensor([0.1, 0.1]), anomaly_map=maps))
    assert result.pred_label.tolist() == [False, True]
    assert result.pred_score.tolist() == [pytest.approx(0.1), 1]
    assert result.pred_mask.flatten(1).sum(dim=1).tolist() == [0, 1]
    broken = post(InferenceBatch(pred_score=torch.tensor([0.1, value]), anomaly_map=maps[:1].repeat(2, 1, 1, 1)))
    assert broken.pred_label.tolist() == [False, True]
