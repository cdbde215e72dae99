"""The plain torch model: its formula, its sizes, its independence of Lightning."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule

import anomalib_wtflow
from anomalib_wtflow import WTFlowModel
from anomalib_wtflow.anomaly_map import density_proxy
from anomalib_wtflow.flow.regression import thin

SOURCE = Path(anomalib_wtflow.__file__).parent


def fitted(**kwargs: object) -> WTFlowModel:
    model = WTFlowModel(**kwargs).eval()
    if not model.normalization.fitted:
        model.normalization.update(model.extract(torch.randn(4, 3, 128, 128)))
        model.normalization.finalize()
    return model


def test_one_step_formula() -> None:
    """y = x0 + v((1 - t_s) x0, t_s), and t_s = 0 is the paper's one-step inference."""
    paper = {
        "layers": ["blocks.4"],
        "time_sampling": "uniform",
        "density": "gaussian",
        "image_score": "map",
        "contrast": 0.0,
        "sigma": 0.0,
    }
    for start_time in (0.0, 0.3):
        model = fitted(start_time=start_time, path="linear", **paper)
        features = model.extract(torch.randn(2, 3, 64, 64))
        x0 = model.normalization(features)
        y = x0 + model.field((1 - start_time) * x0, torch.full((2,), start_time))
        torch.testing.assert_close(model.flow(x0), y)
        up = torch.nn.functional.interpolate(-density_proxy(y), (64, 64), mode="bilinear")
        result = model.predict(features, (64, 64))
        torch.testing.assert_close(result.anomaly_map, up)
        torch.testing.assert_close(result.pred_score, up.flatten(1).topk(123).values.mean(1))


def test_thinning_takes_every_second_position() -> None:
    x = torch.arange(2 * 3 * 6 * 5.0).reshape(2, 3, 6, 5)
    offsets = {(i, j): x[..., i::2, j::2] for i in range(2) for j in range(2)}
    drawn = [next(k for k, part in offsets.items() if part.shape == y.shape and part.equal(y)) for y in
             (thin(x, 2) for _ in range(60))]  # fmt: skip
    assert set(drawn) == set(offsets)
    assert thin(x, 1) is x
    assert thin(x, 7) is x


def test_only_pointwise_fields_are_thinned() -> None:
    x0 = torch.randn(2, 176, 16, 16)
    for network, side in (("pointwise", 8), ("unet", 16)):
        model = fitted(network=network, width=8, coupling="worst_of_two")
        prediction, velocity = model.regress(x0)
        assert prediction.shape == velocity.shape == (2, 176, side, side)


def test_several_steps_follow_the_mean_velocity() -> None:
    """A constant field moves every point by itself, whatever the solver, the number of steps and the start time."""
    model = fitted(start_time=0.25, steps=7, solver="rk4", path="gaussian")
    model.field.forward = lambda x, t: torch.full_like(x, 2.0)
    x0 = torch.randn(1, 112, 3, 3)
    torch.testing.assert_close(model.flow(x0), x0 + 2)


def test_regression_target() -> None:
    """On the linear path the target is eps - x0, and the noise never points towards the data."""
    model = fitted(path="linear", coupling="worst_of_two", thinning=1).train()
    images = torch.randn(3, 3, 64, 64)
    x0 = model.normalization(model.extract(images))
    prediction, velocity = model(images)
    noise = velocity + x0
    assert prediction.shape == velocity.shape == x0.shape
    assert ((noise * x0).sum(1) <= 1e-3).all()
    assert noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [(128, 128), (100, 75), (64, 200), (67, 61)])
@pytest.mark.parametrize("network", ["pointwise", "unet"])
def test_any_input_size(size: tuple[int, int], network: str) -> None:
    result = fitted(layers=["blocks.2", "blocks.4"], network=network, width=16, merge="finest")(
        torch.randn(2, 3, *size)
    )
    assert result.anomaly_map.shape == (2, 1, *size)
    assert result.pred_score.shape == (2,)
    assert result.pred_score.isfinite().all()


def test_modes() -> None:
    model = fitted().train()
    assert not model.feature_extractor.training
    assert len(model(torch.randn(2, 3, 64, 64))) == 2
    assert isinstance(model.eval()(torch.randn(2, 3, 64, 64)).pred_score, torch.Tensor)


def test_images_do_not_influence_each_other() -> None:
    model = fitted(network="unet", width=8)
    images = torch.randn(3, 3, 128, 128)
    together = model(images).pred_score
    alone = torch.cat([model(image[None]).pred_score for image in images])
    torch.testing.assert_close(together, alone)


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="not trained: fit it first, or load a checkpoint"):
        WTFlowModel().eval()(torch.randn(1, 3, 64, 64))
    with pytest.raises(
        ValueError, match="Images of 32x32 pixels give 2x2 features, and the network needs 8x8: raise image"
    ):
        WTFlowModel(network="unet", width=8)(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="start_time is 1"):
        WTFlowModel(start_time=1.0)
    with pytest.raises(ValueError, match="thinning is 0: give a stride of at least 1"):
        WTFlowModel(thinning=0)
    with pytest.raises(ValueError, match="Unknown fields 'layer': "):
        WTFlowModel(fields="layer")
    with pytest.raises(ValueError, match="Unknown density 'cauchy': choose one of gaussian, student"):
        WTFlowModel(density="cauchy")
    with pytest.raises(ValueError, match="Unknown coupling 'nearest'"):
        WTFlowModel(coupling="nearest")


def test_no_lightning_in_the_method() -> None:
    assert not issubclass(WTFlowModel, LightningModule)
    parts = ["path", "coupling", "field", "solver", "normalization", "anomaly_map", "loss", "feature_extractor"]
    parts += ["fit", "oracle", "log_density", "diagnostics", "toy"]
    code = f"import sys, {', '.join('anomalib_wtflow.' + part for part in parts)}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_import_cycles() -> None:
    """Every import of one of our modules by another, wherever it stands in the file, together form no cycle."""
    graph: dict[str, set[str]] = {}
    for path in SOURCE.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom | ast.Import)
        ]
        names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        graph[path.stem] = {n.removeprefix("anomalib_wtflow.") for n in names if n.startswith("anomalib_wtflow.")}
    assert graph["torch_model"] >= {"path", "coupling", "field", "solver", "normalization"}
    graph.pop("__init__")  # its imports are for type checkers only
    list(TopologicalSorter(graph).static_order())


def test_one_density_for_one_field() -> None:
    """A joint field has the paper's density proxy over all channels, not the mean over the layers."""
    y = torch.randn(2, 176, 3, 3)
    joint = fitted(fields="joint", density="gaussian")
    torch.testing.assert_close(joint.log_density(y), -0.5 * y.square().mean(1, keepdim=True))
    assert fitted().log_density(y).shape == (2, 3, 3, 3)


def test_compiles_to_one_graph() -> None:
    """Which CUDA graphs need; the resampling is a constant of it."""
    model = fitted(width=8).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for size in ((1, 64, 96), (2, 64, 96), (1, 128, 72)):
        images = torch.randn(size[0], 3, *size[1:])
        with torch.inference_mode():
            given, expected = compiled(images), model(images)
        torch.testing.assert_close(given.anomaly_map, expected.anomaly_map)
        torch.testing.assert_close(given.pred_score, expected.pred_score)


def test_export_before_the_first_prediction_leaves_nothing_behind() -> None:
    model, images = fitted(width=8).eval(), torch.randn(1, 3, 72, 88)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        given, expected = exported(images), model(images)
    torch.testing.assert_close(given.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(given.pred_score, expected.pred_score)
