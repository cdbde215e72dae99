"""The plain torch model: its formula, its sizes, its independence of Lightning."""

import subprocess
import sys

import pytest
import torch

from anomalib_wtflow import WTFlowModel
from anomalib_wtflow.anomaly_map import density_proxy
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.fit import fit_model
from anomalib_wtflow.settings import get_settings

CHANNELS = 24 + 40 + 112
"""Of the default backbone's features."""


def fitted(images: int = 4, **kwargs: object) -> WTFlowModel:
    """A model whose statistics are those of noise; its field has seen it once."""
    model = WTFlowModel(get_settings(**{"max_epochs": 1, "width": 8, "plateau": 0.0, **kwargs}))
    with torch.no_grad():
        rows = list(model.extract(torch.randn(images, 3, 128, 128)))
    fit_model(model, rows, torch.zeros(images, dtype=torch.int64), (128, 128))
    return model


def first(count: int) -> torch.Tensor:
    """The indices of images of the only product."""
    return torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize("start_time", [0.0, 0.3])
def test_one_step_formula(start_time: float) -> None:
    """y = x0 + v((1 - t_s) x0, t_s), and t_s = 0 is the paper's one-step inference."""
    paper = {"density": "gaussian", "image_score": "map", "background_slope": 0.0, "sigma": 0.0, "path": "linear"}
    model = fitted(layers=["blocks.4"], start_time=start_time, **paper)
    features = model.extract(torch.randn(2, 3, 64, 64))
    x0, _ = model.normalise(features)
    with torch.no_grad():
        y = x0 + model.field((1 - start_time) * x0, torch.full((2,), start_time))
        torch.testing.assert_close(model.flow(x0, first(2)), y)
        up = torch.nn.functional.interpolate(-density_proxy(y), (64, 64), mode="bilinear")
        result = model.predict(features, (64, 64))
    torch.testing.assert_close(result.anomaly_map, up)
    torch.testing.assert_close(result.pred_score, up.flatten(1).topk(123).values.mean(1))


def test_several_steps_follow_the_mean_velocity() -> None:
    """A constant field moves every point by itself, whatever the solver, the number of steps and the start time."""
    model = fitted(start_time=0.25, steps=7, solver="rk4", path="gaussian")
    model.field.forward = lambda x, t, class_embedding: torch.full_like(x, 2.0)
    x0 = torch.randn(1, CHANNELS, 3, 3)
    torch.testing.assert_close(model.flow(x0, first(1)), x0 + 2)


@pytest.mark.parametrize("size", [(100, 75), (64, 200), (67, 61)])
@pytest.mark.parametrize(("network", "coarsest"), [("pointwise", "blocks.4"), ("unet", "blocks.2")])
def test_any_input_size(size: tuple[int, int], network: str, coarsest: str) -> None:
    """The U-Net needs 8 x 8 positions of the coarsest layer. Each image is scored by itself."""
    model = fitted(layers=["blocks.1", coarsest], network=network)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        result, alone = model(images), model(images[1:])
    assert result.anomaly_map.shape == (2, 1, *size)
    assert result.pred_score.isfinite().all()
    torch.testing.assert_close(result.pred_score[1:], alone.pred_score)


def test_the_model_always_evaluates() -> None:
    model = fitted(network="unet", layers=["blocks.1", "blocks.2"]).train()
    assert not any(module.training for module in model.modules())


def test_a_model_can_load_its_own_state() -> None:
    model = fitted()
    model.load_state_dict(model.state_dict())
    assert model.fitted


def test_errors() -> None:
    with pytest.raises(WTFlowError, match="not trained: train it first, or load a checkpoint"):
        WTFlowModel()(torch.randn(1, 3, 64, 64))
    with pytest.raises(WTFlowError, match="Images of 32x32 pixels give 2x2 features, and the network needs at least 8"):
        WTFlowModel(get_settings(network="unet", width=8)).extract(torch.randn(1, 3, 32, 32))


def test_no_lightning_in_the_method() -> None:
    parts = ["flow.regression", "fit", "torch_model", "anomaly_map", "settings", "features.store"]
    code = f"import sys, {', '.join('anomalib_wtflow.' + part for part in parts)}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("network", ["pointwise", "unet"])
def test_the_first_weights_depend_on_the_seed_alone(network: str) -> None:
    """Bit by bit, a random backbone's too, whatever torch's own generator is at, which stays where it is."""

    def build(seed: int, elsewhere: int) -> WTFlowModel:
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        model = WTFlowModel(get_settings(seed=seed, network=network, width=8, pre_trained=False))
        assert torch.get_rng_state().equal(before)
        return model

    one, again, other = build(1, elsewhere=3), build(1, elsewhere=4), build(2, elsewhere=3)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    random = [
        (parameter, other.field.get_parameter(name))
        for name, parameter in one.field.named_parameters()
        if parameter.dim() > 1 and not name.endswith("class_map")
    ]  # those of one dimension start at 0 or 1 in batch normalisations, class maps at 0
    assert random
    assert not any(torch.equal(*pair) for pair in random)


def test_compiles_to_one_graph() -> None:
    """Which CUDA graphs need; the resampling is a constant of it."""
    if torch.compile(lambda: torch.compiler.is_exporting(), backend="eager", fullgraph=True)():
        pytest.skip(f"torch {torch.__version__} takes a compilation for an export, whose graph has other operations")
    model = fitted()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for size in ((1, 64, 96), (2, 128, 72)):
        images = torch.randn(size[0], 3, *size[1:])
        with torch.inference_mode():
            given, expected = compiled(images), model(images)
        torch.testing.assert_close(given.anomaly_map, expected.anomaly_map)
        torch.testing.assert_close(given.pred_score, expected.pred_score)


def test_export_before_the_first_prediction_leaves_nothing_behind() -> None:
    model, images = fitted(), torch.randn(1, 3, 72, 88)
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        given, expected = exported(images), model(images)
    torch.testing.assert_close(given[0], expected.pred_score)
    torch.testing.assert_close(given[1], expected.anomaly_map)
