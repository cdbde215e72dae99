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
from anomalib_wtflow.settings import get_settings

SOURCE = Path(anomalib_wtflow.__file__).parent


def fitted(**kwargs: object) -> WTFlowModel:
    model = WTFlowModel(get_settings(**kwargs)).eval()
    if not model.normalization.fitted:
        model.normalization.update(model.extract(torch.randn(4, 3, 128, 128)))
        model.normalization.finalize()
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
             (thin(x) for _ in range(60))]  # fmt: skip
    assert set(drawn) == set(offsets)
    for line in (x[..., :1, :], x[..., :1]):
        assert thin(line) is line


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
    """On the linear path the target is eps - x0, and the noise never points towards the data.

    The features of such low images are a single row, which is taken whole.
    """
    model = fitted(path="linear", coupling="worst_of_two").train()
    images = torch.randn(3, 3, 16, 256)
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
        WTFlowModel(get_settings(network="unet", width=8))(torch.randn(1, 3, 32, 32))


def test_no_lightning_in_the_method() -> None:
    assert not issubclass(WTFlowModel, LightningModule)
    parts = [f"flow.{name}" for name in ("path", "coupling", "field", "solver", "normalization", "regression")]
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
    assert used >= {f"flow.{name}" for name in ("path", "coupling", "field", "solver", "normalization")}
    graph.pop("__init__")  # its imports are for type checkers only
    list(TopologicalSorter(graph).static_order())


def test_one_density_for_one_layer() -> None:
    """A single layer has the paper's density proxy over all channels; several have one each."""
    y = torch.randn(2, 176, 3, 3)
    single = fitted(layers=["blocks.4"], density="gaussian")
    torch.testing.assert_close(single.log_density(y[:, :112]), -0.5 * y[:, :112].square().mean(1, keepdim=True))
    assert fitted().log_density(y).shape == (2, 3, 3, 3)


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
    torch.testing.assert_close(generator.limit, values.flatten(1).mean(1).max())
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
        (one, two) for one, two in zip(first.field.parameters(), other.field.parameters(), strict=True) if one.dim() > 1
    ]  # those of one dimension start at 0 or 1 in batch normalisations
    assert random
    assert not any(torch.equal(one, two) for one, two in random)


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
