"""What docs/plugin.md says of anomalib and of plugins, tried on the plugin that the page shows."""

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import ImageBatch, InferenceBatch, get_datamodule
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from anomalib.models import UnknownModelError, get_model, list_models
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_wtflow import FastflowBaseline, SyntheticParts
from conftest import quiet_engine

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plugin.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin of the page: its files as they stand there, and the hook that its commands copy."""
    root = tmp_path_factory.mktemp("plugin")
    for text in blocks("toml") + blocks("python"):
        named = re.match(r"# (\S+\.\w+)\n", text)
        if named:
            (root / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (root / named[1]).write_text(text)
    (script,) = (text for text in blocks("bash") if "sed" in text)
    command = ["bash", "-euc", script]
    subprocess.run(command, cwd=root, check=True, env={"WTFLOW": str(ROOT / "src"), "PATH": "/usr/bin:/bin"})
    return root


@pytest.fixture(scope="session")
def plugin(folder: Path) -> Iterator[ModuleType]:
    """The plugin's module, imported."""
    sys.path.insert(0, str(folder / "src"))
    yield importlib.import_module("pixel_gaussian.lightning_model")
    sys.path.remove(str(folder / "src"))


@pytest.fixture
def small(parts_root: Path) -> SyntheticParts:
    """A data set of 64 px: 32 good parts to train on, and 20 + 3 x 4 to validate and test on."""
    return SyntheticParts(parts_root, train_images=32, test_images=20, defect_images=4, side=64, train_batch_size=1)


def run(folder: Path, code: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run code in a new interpreter that starts as where the plugin is installed; return what it printed."""
    start = f"import site; site.addsitedir({str(folder / 'src')!r})\n"
    command = [sys.executable, "-W", "ignore", "-c", start + code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_the_plugin_of_this_page_trains_and_exports(
    plugin: ModuleType, small: SyntheticParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's commands in Python: found by name, trained, tested, loaded; exported, it agrees with torch."""
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    (code,) = (text for text in blocks("python") if "get_model" in text)
    names: dict[str, Any] = {"datamodule": small}
    exec(code, names)
    model, (metrics,), path = names["model"], names["metrics"], names["path"]
    assert type(model) is plugin.PixelGaussian
    assert metrics["pixel_AUROC"] > 0.9
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == list(InferenceBatch._fields)
    images = torch.rand(3, 3, 100, 80)
    got = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        expected = model.eval()(images)
    for value, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(value, wanted.numpy(), atol=1e-5)


# Registration --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_found_by_name_beside_another_plugin(folder: Path) -> None:
    """Nobody imports the plugin: its .pth file does, and ours does not stand in its way."""
    code = """
from anomalib.models import PixelGaussian, WTFlow, get_model, list_models
dotted = "pixel_gaussian.lightning_model.PixelGaussian"
for name in ("PixelGaussian", "pixel_gaussian", {"class_path": "PixelGaussian"}, {"class_path": dotted}):
    assert type(get_model(name)) is PixelGaussian
assert "pixel_gaussian" in list_models()
"""
    run(folder, code)
    run(folder, f"import pixel_gaussian.lightning_model\n{code}")


@pytest.mark.slow
def test_a_class_that_is_not_loaded_is_not_found(folder: Path) -> None:
    """The command line imports a dotted path, and then the name is known."""
    code = f"""
import sys; sys.path.insert(0, {str(folder / "src")!r})
from anomalib.models import UnknownModelError, get_model
try:
    get_model("PixelGaussian")
except UnknownModelError:
    from anomalib.cli.cli import AnomalibCLI
    AnomalibCLI.instantiate_classes = lambda self: None
    AnomalibCLI(["train", "--model", "pixel_gaussian.lightning_model.PixelGaussian"], run=False)
    print(type(get_model("PixelGaussian")).__name__)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split()[-1] == "PixelGaussian"


def test_entry_points_are_not_read() -> None:
    import anomalib

    sources = Path(anomalib.__file__).parent.rglob("*.py")
    assert not [file for file in sources if "entry_points" in file.read_text(encoding="utf-8")]


@pytest.mark.slow
def test_the_command_line_takes_it(folder: Path, tmp_path: Path) -> None:
    """Its own arguments and anomalib's components, by their names."""
    arguments = ["train", "--model", "PixelGaussian", "--model.lr", "0.05", "--model.visualizer", "false"]
    arguments += ["--data", "SyntheticParts", "--data.side", "64", "--trainer.max_epochs", "1"]
    run(folder, "from anomalib.cli.cli import main; main()", *arguments, cwd=tmp_path)
    (checkpoint,) = tmp_path.glob("results/PixelGaussian/SyntheticParts/v0/weights/lightning/model.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"] == {"size": 64, "lr": 0.05}


def test_where_names_are_looked_up() -> None:
    """The command line knows subclasses of subclasses; get_model only direct ones, and paths on the whitelist."""

    class ParseOnly(AnomalibCLI):
        def instantiate_classes(self) -> None:
            pass

    arguments = ["train", "--model", "FastflowBaseline", "--data", "SyntheticParts"]
    parsed = ParseOnly(arguments, run=False).config.train.model
    assert parsed.class_path == "anomalib_wtflow.FastflowBaseline"
    assert "fastflow_baseline" not in list_models()
    for name in ("FastflowBaseline", {"class_path": "FastflowBaseline"}):
        with pytest.raises(UnknownModelError):
            get_model(name)
    with pytest.raises(UnknownModelError) as caught:
        get_model({"class_path": "anomalib_wtflow.training.baselines.FastflowBaseline"})
    assert str(caught.value.__cause__) == "Module import from 'anomalib_wtflow.training.baselines' is not allowed."
    named = {"class_path": "anomalib_wtflow.FastflowBaseline", "init_args": {"pre_trained": False}}
    assert type(get_model(named)) is FastflowBaseline


def test_a_data_modules_image_size_becomes_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib.data.Mine", dict, raising=False)
    config = {"class_path": "Mine", "init_args": {"image_size": 64, "side": 64}}
    assert get_datamodule(config) == {"image_size": (64, 64), "side": 64}
    with pytest.raises(ModuleNotFoundError, match=r"'Unheard' not found in module 'anomalib.data'"):
        get_datamodule({"class_path": "anywhere.Unheard"})


# Training ------------------------------------------------------------------------------------------------------------


def short(root: Path, **kwargs: object) -> Engine:
    """An engine of one training step and one validation step."""
    return quiet_engine(root, **{"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, **kwargs})


def test_without_a_limit_lightning_trains_1000_epochs(
    plugin: ModuleType, small: SyntheticParts, tmp_path: Path
) -> None:
    seen = []

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.max_epochs)
            trainer.should_stop = True

    short(tmp_path, max_epochs=None, callbacks=[Stop()]).fit(plugin.PixelGaussian(), datamodule=small)
    assert seen == [1000]
    assert "max_" not in inspect.getsource(BenchmarkJob.run)


def test_trainer_arguments_beat_the_user(plugin: ModuleType, tmp_path: Path) -> None:
    class OneEpoch(plugin.PixelGaussian):
        trainer_arguments = {"max_epochs": 1}  # noqa: RUF012

    engine = quiet_engine(tmp_path, max_epochs=5)
    engine._setup_trainer(OneEpoch())
    assert engine.trainer.max_epochs == 1


def test_components_are_callbacks(plugin: ModuleType, small: SyntheticParts, tmp_path: Path) -> None:
    """The data set does a pre-processor's first resize, the callback all of it; the threshold is a callback's too."""
    seen = {}

    class Watching(plugin.PixelGaussian):
        def training_step(self, batch: ImageBatch, *args: object) -> Tensor:
            seen[type(self).__name__] = (batch.image.shape[-1], bool(batch.image.mean() < 0))
            return super().training_step(batch)

    class Forgetful(Watching):
        def configure_callbacks(self) -> list[Callback]:
            return []

    thresholds = []
    for kind in (Watching, Forgetful):
        transform = Compose([Resize((32, 32), antialias=False), Normalize([9.0] * 3, [1.0] * 3)])
        model = kind(size=32, pre_processor=PreProcessor(transform))
        short(tmp_path).fit(model, datamodule=small)
        thresholds.append(bool(model.post_processor.image_threshold.isfinite()))
    assert seen == {"Watching": (32, True), "Forgetful": (32, False)}
    assert thresholds == [True, False]


@pytest.mark.slow
def test_the_command_lines_seed_is_never_used(
    plugin: ModuleType, parts_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", "PixelGaussian", "--data", "SyntheticParts", "--data.root", str(parts_root)]
    arguments += ["--data.side", "64", "--seed_everything", "7", "--trainer.fast_dev_run", "1"]
    torch.manual_seed(12345)
    AnomalibCLI(arguments)
    assert torch.initial_seed() == 12345


def test_rows_of_a_benchmark_have_the_same_arguments() -> None:
    rows = [{"model.init_args.size": 64, "image_AUROC": 1.0}, {"image_AUROC": 1.0}]
    with pytest.raises(ValueError, match="same length"):
        BenchmarkJob.collect(rows)
    with pytest.raises(KeyError):
        BenchmarkJob.collect(rows[::-1])


# Checkpoints ---------------------------------------------------------------------------------------------------------


class Mode(Enum):
    A = "a"


def checkpoint(model: Any, data: SyntheticParts, root: Path) -> str:
    """Train a model for a step; return its checkpoint."""
    engine = short(root)
    engine.fit(model, datamodule=data)
    return engine.best_model_path


def test_hyper_parameters_are_plain(plugin: ModuleType, small: SyntheticParts, tmp_path: Path) -> None:
    """Paths become text; a type of one's own loads only if the class says so."""

    class Typed(plugin.PixelGaussian):
        def __init__(self, mode: Mode = Mode.A, where: Path = Path("file")) -> None:
            super().__init__()

    path = checkpoint(Typed(), small, tmp_path)
    with pytest.raises(Exception, match="Weights only load failed"):
        Typed.load_from_checkpoint(path)
    Typed.checkpoint_safe_globals = classmethod(lambda cls: (Mode,))
    loaded = Typed.load_from_checkpoint(path)
    assert (loaded.hparams["mode"], loaded.hparams["where"]) == (Mode.A, "file")


def test_an_argument_changed_before_super_is_saved_changed(
    plugin: ModuleType, small: SyntheticParts, tmp_path: Path
) -> None:
    class Doubling(plugin.PixelGaussian):
        def __init__(self, side: int = 16) -> None:
            side = 2 * side
            super().__init__(size=side)

    path = checkpoint(Doubling(), small, tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["side"] == 32
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.mean"):
        Doubling.load_from_checkpoint(path)


class Counting(PostProcessor):
    """A post-processor with a buffer more."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(5))


def test_a_post_processor_that_was_passed_does_not_reload(
    plugin: ModuleType, small: SyntheticParts, tmp_path: Path
) -> None:
    """Loading builds the one of configure_post_processor."""

    class Ours(plugin.PixelGaussian):
        def configure_post_processor(self) -> PostProcessor:
            return Counting()

    path = checkpoint(plugin.PixelGaussian(post_processor=Counting()), small, tmp_path)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "post_processor.count"'):
        plugin.PixelGaussian.load_from_checkpoint(path)
    assert Ours.load_from_checkpoint(path).post_processor.count == 5


def test_tests_take_the_models_settings_and_exports_the_checkpoints(
    plugin: ModuleType, small: SyntheticParts, tmp_path: Path
) -> None:
    exported = []

    class Scaled(plugin.PixelGaussian):
        def __init__(self, scale: float = 1.0) -> None:
            super().__init__(visualizer=False)
            self.scale = scale

        def to_torch(self, *args: object, **kwargs: object) -> None:
            exported.append(self.scale)

    trained, other = Scaled(2.0), Scaled(5.0)
    path = checkpoint(trained, small, tmp_path)
    quiet_engine(tmp_path).test(other, datamodule=small, ckpt_path=path)
    assert torch.equal(other.model.mean, trained.model.mean)
    assert other.scale == 5.0
    quiet_engine(tmp_path).export(Scaled(5.0), "torch", ckpt_path=path)
    assert exported == [2.0]


# Post-processor ------------------------------------------------------------------------------------------------------


def test_the_engine_does_not_run_the_post_processors_forward(
    plugin: ModuleType, small: SyntheticParts, tmp_path: Path
) -> None:
    class Zero(PostProcessor):
        def forward(self, predictions: InferenceBatch) -> InferenceBatch:
            return predictions._replace(pred_score=torch.zeros_like(predictions.pred_score))

    model = plugin.PixelGaussian(post_processor=Zero(), visualizer=False)
    batches = quiet_engine(tmp_path).predict(model, datamodule=small)
    assert min(float(batch.pred_score.min()) for batch in batches) > 0
    assert (model(torch.rand(2, 3, 64, 64)).pred_score == 0).all()


def test_maps_lose_their_channel_in_batches(plugin: ModuleType) -> None:
    prediction = plugin.PixelGaussianModel(8)(torch.rand(2, 3, 8, 8))
    assert prediction.anomaly_map.shape == (2, 1, 8, 8)
    assert ImageBatch(image=torch.rand(2, 3, 8, 8)).update(**prediction._asdict()).anomaly_map.shape == (2, 8, 8)


def test_unknown_fields_of_a_batch_are_dropped() -> None:
    batch = ImageBatch(image=torch.rand(2, 3, 8, 8))
    assert not hasattr(batch.update(product=1), "product")
    batch.product = 1
    assert batch.update(pred_score=torch.rand(2)).product == 1


def validated(labels: list[int]) -> PostProcessor:
    """anomalib's post-processor after a validation of images that score 1, 2, 3 and 4."""
    post = PostProcessor()
    scores, maps = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.rand(4, 2, 2)
    fields = {"pred_score": scores, "anomaly_map": maps, "gt_label": torch.tensor(labels), "gt_mask": maps > 1}
    batch = ImageBatch(image=torch.rand(4, 3, 2, 2), **fields)
    post.on_validation_batch_end(None, None, batch)
    post.on_validation_epoch_end(None, None)
    return post


def score(post: PostProcessor, *scores: float) -> tuple[list[float], list[bool]]:
    result = post(InferenceBatch(pred_score=torch.tensor(scores), anomaly_map=torch.rand(len(scores), 1, 2, 2)))
    return result.pred_score.tolist(), result.pred_label.tolist()


def test_anomalibs_threshold_of_normal_images_is_the_largest() -> None:
    post = validated([0, 0, 0, 0])
    assert post.image_threshold == 4
    assert score(post, 4.0, 4.1)[1] == [False, True]


def test_anomalibs_scores_tie_at_the_ends() -> None:
    assert score(validated([0, 0, 1, 1]), 0.1, 1.0, 5.0, 50.0)[0][2:] == [1.0, 1.0]
    assert score(validated([0, 0, 0, 0]), 0.1, 1.0)[0] == [0.0, 0.0]


def test_without_a_validation_raw_scores_are_compared_with_a_half() -> None:
    assert score(PostProcessor(), 0.25, 3.0) == ([0.25, 3.0], [False, True])


def test_nan_is_normal_to_anomalib() -> None:
    """And metrics of nothing but NaN are numbers."""
    assert score(validated([0, 0, 1, 1]), float("nan"))[1] == [False]
    metric = AUROC(fields=["pred_score", "gt_label"])
    nothing = torch.full((4,), torch.nan)
    metric.update(ImageBatch(image=torch.rand(4, 3, 2, 2), pred_score=nothing, gt_label=torch.tensor([0, 0, 1, 1])))
    assert metric.compute().isfinite()


def test_strict_metrics_need_masks() -> None:
    batch = ImageBatch(image=torch.rand(2, 3, 2, 2), anomaly_map=torch.rand(2, 2, 2))
    with pytest.raises(ValueError, match="does not have a value for field with name gt_mask"):
        AUROC(fields=["anomaly_map", "gt_mask"]).update(batch)
    AUROC(fields=["anomaly_map", "gt_mask"], strict=False).update(batch)


# Exports -------------------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A model whose map is a function of the images."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> InferenceBatch:
        anomaly_map = self.function(self, images)
        return InferenceBatch(pred_score=anomaly_map.amax((1, 2, 3)), anomaly_map=anomaly_map)


def foreign(plugin: ModuleType, function: Any, resize: bool = True) -> Any:
    """The plugin with another torch model, and nothing behind it."""
    model = plugin.PixelGaussian(pre_processor=resize, post_processor=False).eval()
    model.model = Foreign(function)
    return model


def in_onnx(path: Path, images: Tensor) -> np.ndarray:
    import onnxruntime

    return onnxruntime.InferenceSession(path).run(["anomaly_map"], {"input": images.numpy()})[0]


def in_openvino(path: Path, images: Tensor) -> np.ndarray:
    import openvino

    return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())["anomaly_map"]


def largest(model: nn.Module, images: Tensor) -> Tensor:
    """The mean of the largest 3 % of an image's values."""
    count = max(1, int(0.03 * images.shape[-2] * images.shape[-1]))
    return images.flatten(1).topk(count, 1).values.mean(1)[:, None, None, None]


def fourier(model: nn.Module, images: Tensor) -> Tensor:
    return torch.fft.rfft2(images).abs().mean(1, keepdim=True)


def smaller(model: nn.Module, images: Tensor) -> Tensor:
    return nn.functional.interpolate(images, size=(32, 32), mode="bilinear", antialias=True).mean(1, keepdim=True)


def noisy(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(0)
    return (images + torch.randn_like(images)).mean(1, keepdim=True)


def generated(model: nn.Module, images: Tensor) -> Tensor:
    return images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def integrated(model: Any, images: Tensor) -> Tensor:
    from torchdiffeq import odeint

    return odeint(lambda t, x: model.layer(x), images, torch.tensor([0.0, 1.0]), method="euler")[-1]


def branching(model: nn.Module, images: Tensor) -> Tensor:
    return images if images.mean() > 0 else -images


@pytest.mark.slow
@pytest.mark.parametrize("function", [generated, integrated, branching])
def test_what_does_not_export(plugin: ModuleType, function: Any, tmp_path: Path) -> None:
    assert foreign(plugin, function)(torch.rand(2, 3, 64, 64)).anomaly_map.shape == (2, 3, 64, 64)
    with pytest.raises(Exception, match=r"Failed to export the model with torch\.export"):
        foreign(plugin, function).to_onnx(tmp_path)


@pytest.mark.slow
def test_noise_stays_random_in_a_graph(plugin: ModuleType, tmp_path: Path) -> None:
    """Whatever seed the model sets."""
    import onnxruntime

    path, images = foreign(plugin, noisy).to_onnx(tmp_path), torch.rand(2, 3, 64, 64)
    session = onnxruntime.InferenceSession(path)
    first, second = (session.run(["anomaly_map"], {"input": images.numpy()})[0] for _ in range(2))
    assert np.abs(first - second).max() > 0.1
    assert torch.equal(noisy(nn.Identity(), images), noisy(nn.Identity(), images))


@pytest.mark.slow
@pytest.mark.parametrize("function", [fourier, smaller])
def test_what_openvino_computes_otherwise(plugin: ModuleType, function: Any, tmp_path: Path) -> None:
    """ONNX Runtime agrees with torch; OpenVINO gives another shape, or other values."""
    model, images = foreign(plugin, function), torch.rand(2, 3, 64, 64)
    path, expected = model.to_onnx(tmp_path), model(images).anomaly_map.numpy()
    np.testing.assert_allclose(in_onnx(path, images), expected, atol=1e-3)
    got = in_openvino(path, images)
    assert got.shape != expected.shape or np.abs(got - expected).max() > 0.01


@pytest.mark.slow
def test_sizes_are_frozen_without_a_resize(plugin: ModuleType, tmp_path: Path) -> None:
    """k is that of the 2 x 2 pixels that anomalib exports with: 1."""
    images = torch.rand(2, 3, 64, 64)
    whole, bare = (foreign(plugin, largest, resize) for resize in (True, False))
    expected = largest(whole, images).numpy()
    np.testing.assert_allclose(in_onnx(whole.to_onnx(tmp_path / "whole"), images), expected, atol=1e-5)
    frozen = in_onnx(bare.to_onnx(tmp_path / "bare"), images)
    np.testing.assert_allclose(frozen, images.flatten(1).amax(1)[:, None, None, None].numpy())
    assert (frozen > expected).all()


@pytest.mark.slow
def test_files_and_opset(plugin: ModuleType, folder: Path, tmp_path: Path) -> None:
    """anomalib asks for opset 14, and gets 18 with a traceback in the log."""
    import onnx

    code = """
import logging, sys
from pixel_gaussian.lightning_model import PixelGaussian
logging.basicConfig(stream=sys.stdout)
asked = {"opset_version": int(sys.argv[2])} if len(sys.argv) > 2 else {}
PixelGaussian().to_onnx(sys.argv[1], **asked)
"""
    for name, opset, complains in (("default", (), True), ("asked", ("18",), False)):
        log = run(folder, code, str(tmp_path / name), *opset)
        (path,) = (tmp_path / name).rglob("model.onnx")
        assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
        assert onnx.load(path, load_external_data=False).opset_import[0].version == 18
        assert ("Failed to convert the model to the target version 14" in log) is complains
    with pytest.raises(ValueError, match=r"legacy ONNX exporter path .* was removed in anomalib 2.7.0"):
        plugin.PixelGaussian().to_onnx(tmp_path, dynamo=False)


def test_exports_resize_without_antialiasing() -> None:
    processor = PreProcessor(Resize((8, 8), antialias=True))
    images = torch.rand(1, 3, 32, 32)
    assert (processor.transform(images) - processor(images)).abs().max() > 0.1


def test_int8_is_calibrated_with_validation_images(
    plugin: ModuleType, small: SyntheticParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nncf
    import openvino

    loaders: list[Any] = []
    monkeypatch.setattr(nncf, "Dataset", lambda loader, transform: loaders.append(loader))
    monkeypatch.setattr(nncf, "quantize", lambda model, dataset: model)
    parameter = openvino.opset13.parameter([-1, 3, 64, 64])
    model = openvino.Model([openvino.opset13.relu(parameter)], [parameter])
    plugin.PixelGaussian._post_training_quantization_ov(model, small)
    assert loaders[0].dataset is small.val_data


def test_the_pickled_model_needs_trust(plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plugin.PixelGaussian().to_torch(tmp_path)
    monkeypatch.delenv("TRUST_REMOTE_CODE")
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE=1"):
        TorchInferencer(path, device="cpu")
