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
from anomalib_wtflow.flow.sampling import LEAST, PositionSampling
from anomalib_wtflow.settings import get_settings
from anomalib_wtflow.torch_model import averaged_over

SOURCE = Path(anomalib_wtflow.__file__).parent
CHANNELS = 24 + 40 + 112
"""Of the default features: two finer layers with 2 x 2 positions each, and the coarsest."""


def fitted(**kwargs: object) -> WTFlowModel:
    model = WTFlowModel(get_settings(**kwargs)).eval()
    if not model.normalization.fitted:
        model.update(model.extract(torch.randn(4, 3, 128, 128)), torch.zeros(4, dtype=torch.int64))
        model.finalize()
    return model


def test_one_step_formula() -> None:
    """y = x0 + v((1 - t_s) x0, t_s), and t_s = 0 is the paper's one-step inference."""
    paper = {
        "layers": ["blocks.4"],
        "density": "gaussian",
        "image_score": "map",
        "contrast": 0.0,
        "sigma": 0.0,
    }
    for start_time in (0.0, 0.3):
        model = fitted(start_time=start_time, path="linear", **paper)
        features = model.extract(torch.randn(2, 3, 64, 64))
        x0 = model.normalization(features)
        y = x0 + model.flow_field((1 - start_time) * x0, torch.full((2,), start_time))
        torch.testing.assert_close(model.flow(x0), y)
        up = torch.nn.functional.interpolate(-density_proxy(y), (64, 64), mode="bilinear")
        result = model.predict(features, (64, 64))
        torch.testing.assert_close(result.anomaly_map, up)
        torch.testing.assert_close(result.pred_score, up.flatten(1).topk(123).values.mean(1))


def test_only_pointwise_fields_see_some_of_the_positions() -> None:
    """A few of each layer's, against velocities of the same; others see the whole map."""
    x0 = torch.randn(2, CHANNELS, 16, 15)
    for network, shape in (("pointwise", (2, 176, LEAST, 1)), ("unet", (2, CHANNELS, 16, 15))):
        model = fitted(network=network, width=8, coupling="worst_of_two")
        prediction, velocity = model.regress(x0)
        assert prediction.shape == velocity.shape == shape
        assert isinstance(model.sampling, PositionSampling) == (network == "pointwise")


@pytest.mark.parametrize("detail", [1, 2, 3])
def test_detail_is_that_of_each_layer(detail: int) -> None:
    """At most as fine as the layer itself: 4, 2 and 1 positions a side for strides 4, 8 and 16."""
    model = fitted(detail=detail, width=8)
    finer = [min(detail, most) for most in (4, 2, 1)]
    assert model.detail == model.field.detail == model.sampling.detail == finer
    assert model.channels == model.field.channels == model.sampling.channels == [24, 40, 112]
    assert model.extract(torch.randn(1, 3, 64, 80)).shape == (1, 24 * finer[0] ** 2 + 40 * finer[1] ** 2 + 112, 4, 5)
    assert model.log_density(model.flow(torch.randn(1, model.normalization.mean.numel(), 4, 5))).shape == (
        (1, 3, 4 * finer[0], 5 * finer[0])
    )


def test_rare_positions_are_told_from_the_normalised_features() -> None:
    """``finalize`` fits the sampling to the covariance that the normalisation leaves."""
    model = WTFlowModel(get_settings(width=8, detail=2, importance=0.5)).eval()
    assert model.sampling.importance == 0.5
    assert all(torch.equal(weight, torch.eye(len(weight))) for weight in model.sampling.whitening)
    features = model.extract(torch.randn(4, 3, 128, 128))
    model.update(features, torch.zeros(4, dtype=torch.int64))
    model.finalize()
    rows = model.normalization(features).double().movedim(1, -1).flatten(0, -2)
    expected = PositionSampling([24, 40, 112], [2, 2, 1])
    expected.fit(torch.cov(rows.T, correction=0))
    for weight, other in zip(model.sampling.whitening, expected.whitening, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(weight, torch.eye(len(weight)), atol=0.1)


def test_averaged_weights() -> None:
    """``m_n = m_{n-1} + (w_n - m_{n-1}) / (1 + share (n - 1))``, from ``m_1 = w_1``; buffers are the present ones."""
    field, share = torch.nn.BatchNorm1d(3).double(), 0.3
    averaged = averaged_over(field, share)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert all(parameter.requires_grad for parameter in field.parameters())
    expected: dict[str, torch.Tensor] = {}
    for n in range(1, 8):
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.copy_(torch.randn(3))
            field(torch.randn(5, 3, dtype=torch.float64))
        averaged.update_parameters(field)
        for name, parameter in field.named_parameters():
            before = expected.get(name, torch.full((3,), torch.nan))
            now = parameter.detach().clone()
            expected[name] = now if n == 1 else before + (now - before) / (1 + share * (n - 1))
            torch.testing.assert_close(averaged.module.get_parameter(name), expected[name])
        for name, buffer in field.named_buffers():
            assert torch.equal(averaged.module.get_buffer(name), buffer)


def test_the_flow_follows_the_averaged_field() -> None:
    """Which ``regress`` uses only where it is asked to."""
    model = fitted(width=8, averaging=0.5)
    assert model.flow_field is model.averaged.module is not model.field
    x0, t = torch.randn(1, CHANNELS, 3, 3), torch.tensor([0.35])
    with torch.no_grad():
        first = [parameter.detach().clone() for parameter in model.field.parameters()]
        model.average()
        for parameter in model.field.parameters():
            parameter.add_(torch.randn_like(parameter))
        model.average()
        for one, parameter, mean in zip(first, model.field.parameters(), model.flow_field.parameters(), strict=True):
            torch.testing.assert_close(mean, one + (parameter - one) / 1.5)
        velocity = model.flow_field(model.start_scale * x0, t)
        assert not torch.allclose(velocity, model.field(model.start_scale * x0, t))
        torch.testing.assert_close(model.flow(x0), x0 + velocity)

        def predicted(averaged: bool) -> torch.Tensor:
            return model.regress(x0, torch.Generator().manual_seed(0), averaged=averaged)[0]

        trained, averaged = predicted(averaged=False), predicted(averaged=True)
        assert not torch.allclose(trained, averaged)
        model.field.load_state_dict(model.flow_field.state_dict())
        largest = averaged.abs().max()  # torch 2.14 gives the same bits, 2.10 sums in another order
        torch.testing.assert_close(predicted(averaged=False) / largest, averaged / largest)


def test_no_averaging() -> None:
    """The field that is trained scores, and there is no other in the state."""
    model = fitted(width=8, averaging=0.0)
    assert model.averaged is None
    assert model.flow_field is model.field
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.average()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not [name for name in before if name.startswith("averaged")]
    assert [name for name in fitted(width=8).state_dict() if name.startswith("averaged")]


def test_several_steps_follow_the_mean_velocity() -> None:
    """A constant field moves every point by itself, whatever the solver, the number of steps and the start time."""
    model = fitted(start_time=0.25, steps=7, solver="rk4", path="gaussian")
    model.flow_field.forward = lambda x, t, condition: torch.full_like(x, 2.0)
    x0 = torch.randn(1, CHANNELS, 3, 3)
    torch.testing.assert_close(model.flow(x0), x0 + 2)


def test_regression_target() -> None:
    """On the linear path the target is eps - x0 at drawn positions, and the noise never points towards the data."""
    model = fitted(path="linear", coupling="worst_of_two").train()
    images = torch.randn(3, 3, 128, 256)
    x0 = model.normalization(model.extract(images))
    state = torch.get_rng_state()
    prediction, velocity = model(images)
    torch.set_rng_state(state)
    shown = model.sampling(x0)
    noise = velocity + shown
    assert prediction.shape == velocity.shape == shown.shape == (3, 176, LEAST, 1)
    assert ((noise * shown).sum(1) <= 1e-3).all()
    assert noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [(128, 128), (100, 75), (64, 200), (67, 61)])
@pytest.mark.parametrize(
    ("network", "coarsest", "detail"),
    [("pointwise", "blocks.4", 1), ("pointwise", "blocks.4", 2), ("unet", "blocks.2", 2)],
)
def test_any_input_size(size: tuple[int, int], network: str, coarsest: str, detail: int) -> None:
    """The U-Net needs 8 x 8 positions of the coarsest layer."""
    model = fitted(layers=["blocks.1", coarsest], network=network, width=16, detail=detail)
    result = model(torch.randn(2, 3, *size))
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
        WTFlowModel(get_settings(network="unet", width=8))(torch.randn(1, 3, 32, 32))


def test_no_lightning_in_the_method() -> None:
    assert not issubclass(WTFlowModel, LightningModule)
    parts = [
        f"flow.{name}" for name in ("path", "coupling", "field", "solver", "normalization", "regression", "sampling")
    ]
    parts += [f"theory.{name}" for name in ("oracle", "log_density", "diagnostics", "well")]
    parts += ["features.backbone", "features.folding", "anomaly_map", "loss", "settings"]
    code = f"import sys, {', '.join('anomalib_wtflow.' + part for part in parts)}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_import_cycles() -> None:
    """Every import of one of our modules by another, wherever it stands in the file, together form no cycle."""
    files = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom | ast.Import)
        ]
        names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
        names += [f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]
        names += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        graph[module] = files.keys() & {n.removeprefix("anomalib_wtflow.") for n in names}
    used = graph["torch_model"]
    assert used >= {f"flow.{name}" for name in ("path", "coupling", "field", "solver", "normalization", "sampling")}
    graph.pop("__init__")  # its imports are for type checkers only
    list(TopologicalSorter(graph).static_order())


def test_one_density_for_one_layer() -> None:
    """A single layer has the paper's density proxy over all channels; several have one each."""
    y = torch.randn(2, CHANNELS, 3, 3)
    single = fitted(layers=["blocks.4"], density="gaussian")
    torch.testing.assert_close(single.log_density(y[:, :112]), -0.5 * y[:, :112].square().mean(1, keepdim=True))
    assert fitted().log_density(y).shape == (2, 3, 3, 3)
    finer = torch.randn(2, 24 * 4 + 40 * 4 + 112, 3, 3)
    assert fitted(detail=2).log_density(finer).shape == (2, 3, 6, 6)


def test_features_are_scored_as_their_images() -> None:
    """``observe`` and ``score`` take normalised features, ``predict`` the backbone's."""
    model, images = fitted(), torch.randn(20, 3, 64, 80)
    features = model.extract(images)
    x0 = model.normalization(features)
    assert model.anomaly_map_generator.limit.isinf()
    model.observe(x0, images.shape[-2:])
    generator = model.anomaly_map_generator
    log_density = model.log_density(model.flow(x0))
    values = generator.values(log_density, generator.map(log_density, (64, 80)))
    tops, levels = (part.double() for part in generator.top_and_level(values))
    torch.testing.assert_close(generator.limit[0].double(), 3 * levels.max() - 2 * levels.mean())
    covariance = torch.cov(torch.stack([tops, levels]))
    slope = (covariance[0, 1] / covariance[1, 1]).clamp(0.75, 1.25)
    torch.testing.assert_close(generator.slope[0].double(), slope, rtol=1e-4, atol=1e-4)
    given, predicted, seen = model.score(x0, (64, 80)), model.predict(features, (64, 80)), model(images)
    for name in ("anomaly_map", "pred_score"):
        torch.testing.assert_close(getattr(given, name), getattr(seen, name))
        torch.testing.assert_close(getattr(predicted, name), getattr(seen, name))


@pytest.mark.parametrize("network", ["pointwise", "unet"])
def test_the_first_weights_depend_on_the_seed_alone(network: str) -> None:
    """Bit by bit, a random backbone's too, whatever the global generator is at, which stays where it is."""

    def build(seed: int, elsewhere: int) -> WTFlowModel:
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        model = WTFlowModel(get_settings(seed=seed, network=network, width=8, pre_trained=False))
        assert torch.get_rng_state().equal(before)
        return model

    first, again, other = build(1, elsewhere=3), build(1, elsewhere=4), build(2, elsewhere=3)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    random = [
        (one, other.field.get_parameter(name))
        for name, one in first.field.named_parameters()
        if one.dim() > 1 and not name.endswith("condition")
    ]  # those of one dimension start at 0 or 1 in batch normalisations, those of the condition at 0
    assert random
    assert not any(torch.equal(one, two) for one, two in random)


def test_compiles_to_one_graph() -> None:
    """Which CUDA graphs need; the resampling is a constant of it."""
    if torch.compile(lambda: torch.compiler.is_exporting(), backend="eager", fullgraph=True)():
        pytest.skip(f"torch {torch.__version__} takes a compilation for an export, whose graph has other operations")
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
