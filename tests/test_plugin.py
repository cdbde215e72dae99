"""What docs/plugin.md says of anomalib and of plugins, tried on the plugin that the page shows."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import anomalib
import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from anomalib.models import UnknownModelError, get_model, list_models
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
    script = blocks("bash")[0]
    environment = {"WTFLOW": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", script], cwd=root, check=True, env=environment)
    return root


@pytest.fixture(scope="session")
def plugin(folder: Path) -> Iterator[ModuleType]:
    sys.path.insert(0, str(folder / "src"))
    yield importlib.import_module("pixel_gaussian.lightning_model")
    sys.path.remove(str(folder / "src"))


@pytest.fixture
def small(parts_root: Path) -> SyntheticParts:
    """A data set of 64 px: 32 good parts to train on, and 20 + 3 x 4 to validate and test on."""
    return SyntheticParts(parts_root, train_images=32, test_images=20, defect_images=4, side=64, train_batch_size=1)


def run(folder: Path, code: str, *arguments: str, cwd: Path | None = None) -> None:
    """Run code in a new interpreter that starts as where the plugin is installed."""
    start = f"import site; site.addsitedir({str(folder / 'src')!r})\n"
    command = [sys.executable, "-W", "ignore", "-c", start + code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def short(root: Path, model: Any, data: SyntheticParts) -> str:
    """Train a model for one step and validate it on a batch; return its checkpoint."""
    engine = quiet_engine(root, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    engine.fit(model, datamodule=data)
    return engine.best_model_path


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
    model = names["model"]
    assert type(model) is plugin.PixelGaussian
    assert names["metrics"][0]["pixel_AUROC"] > 0.9
    session = onnxruntime.InferenceSession(names["path"])
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


def test_entry_points_are_not_read() -> None:
    assert not [each for each in Path(anomalib.__file__).parent.rglob("*.py") if "entry_points" in each.read_text()]


@pytest.mark.slow
def test_the_command_line_takes_it(folder: Path, tmp_path: Path) -> None:
    """Its own arguments and anomalib's components, by their names."""
    arguments = "--model PixelGaussian --model.lr 0.05 --model.visualizer false --data SyntheticParts --data.side 64"
    start = "from anomalib.cli.cli import main; main()"
    run(folder, start, "train", *arguments.split(), "--trainer.max_epochs", "1", cwd=tmp_path)
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
    for name in ("FastflowBaseline", {"class_path": "anomalib_wtflow.baselines.FastflowBaseline"}):
        with pytest.raises(UnknownModelError):
            get_model(name)
    named = {"class_path": "anomalib_wtflow.FastflowBaseline", "init_args": {"pre_trained": False}}
    assert type(get_model(named)) is FastflowBaseline


# Training and checkpoints --------------------------------------------------------------------------------------------


def test_epochs(plugin: ModuleType, small: SyntheticParts, tmp_path: Path) -> None:
    """What trainer_arguments has beats the user; without a limit there are 1000."""
    engine = Engine(default_root_dir=tmp_path, max_epochs=5)
    engine._setup_trainer(FastflowBaseline(pre_trained=False))
    assert engine.trainer.max_epochs == 20

    class Stop(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert trainer.max_epochs == 1000
            trainer.should_stop = True

    quiet_engine(tmp_path, callbacks=[Stop()]).fit(plugin.PixelGaussian(), datamodule=small)


def test_components_are_callbacks(plugin: ModuleType, small: SyntheticParts, tmp_path: Path) -> None:
    """Without them images are not normalised, and there is no threshold."""
    means = []

    class Watching(plugin.PixelGaussian):
        def training_step(self, batch: ImageBatch, *args: object) -> Tensor:
            means.append(float(batch.image.mean()))
            return super().training_step(batch)

    class Forgetful(Watching):
        def configure_callbacks(self) -> list[Callback]:
            return []

    for kind in (Watching, Forgetful):
        transform = Compose([Resize((32, 32), antialias=False), Normalize([9.0] * 3, [1.0] * 3)])
        model = kind(size=32, pre_processor=PreProcessor(transform))
        short(tmp_path, model, small)
        assert bool(model.post_processor.image_threshold.isfinite()) is (kind is Watching)
    assert means[0] < 0 < means[1]


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
    path = short(tmp_path, trained, small)
    quiet_engine(tmp_path).test(other, datamodule=small, ckpt_path=path)
    assert torch.equal(other.model.mean, trained.model.mean)
    assert other.scale == 5.0
    quiet_engine(tmp_path).export(Scaled(5.0), "torch", ckpt_path=path)
    assert exported == [2.0]


# Post-processor ------------------------------------------------------------------------------------------------------


class Zero(PostProcessor):
    """A post-processor with a buffer more, whose forward makes each score 0."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(5))

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        return predictions._replace(pred_score=torch.zeros_like(predictions.pred_score))


def test_a_passed_post_processor_does_not_reload(plugin: ModuleType, small: SyntheticParts, tmp_path: Path) -> None:
    """Loading builds the one of configure_post_processor."""
    path = short(tmp_path, plugin.PixelGaussian(post_processor=Zero()), small)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "post_processor.count"'):
        plugin.PixelGaussian.load_from_checkpoint(path)


def test_the_engine_runs_no_post_processors_forward(plugin: ModuleType, small: SyntheticParts, tmp_path: Path) -> None:
    model = plugin.PixelGaussian(post_processor=Zero(), visualizer=False)
    batches = quiet_engine(tmp_path).predict(model, datamodule=small)
    assert min(float(batch.pred_score.min()) for batch in batches) > 0
    assert (model(torch.rand(2, 3, 64, 64)).pred_score == 0).all()


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
    post.on_validation_batch_end(None, None, ImageBatch(image=torch.rand(4, 3, 2, 2), **fields))
    post.on_validation_epoch_end(None, None)
    return post


def score(post: PostProcessor, *scores: float) -> tuple[list[float], list[bool]]:
    result = post(InferenceBatch(pred_score=torch.tensor(scores), anomaly_map=torch.rand(len(scores), 1, 2, 2)))
    return result.pred_score.tolist(), result.pred_label.tolist()


def test_scores_and_labels_of_anomalibs_post_processor() -> None:
    """The largest normal score, ties at both ends, a half without a validation; NaN is normal, and in metrics too."""
    assert score(validated([0, 0, 0, 0]), 4.0, 4.1)[1] == [False, True]
    assert score(validated([0, 0, 1, 1]), 0.1, 1.0, 5.0, 50.0)[0][2:] == [1.0, 1.0]
    assert score(PostProcessor(), 0.25, 3.0) == ([0.25, 3.0], [False, True])
    assert score(validated([0, 0, 1, 1]), float("nan"))[1] == [False]
    metric, nan = AUROC(fields=["pred_score", "gt_label"]), torch.full((4,), torch.nan)
    metric.update(ImageBatch(image=torch.rand(4, 3, 2, 2), pred_score=nan, gt_label=torch.tensor([0, 0, 1, 1])))
    assert metric.compute().isfinite()


# Exports -------------------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> InferenceBatch:
        anomaly_map = self.function(images)
        return InferenceBatch(pred_score=anomaly_map.amax((1, 2, 3)), anomaly_map=anomaly_map)


def foreign(plugin: ModuleType, function: Any) -> Any:
    model = plugin.PixelGaussian(post_processor=False).eval()
    model.model = Foreign(function)
    return model


def fourier(images: Tensor) -> Tensor:
    return torch.fft.rfft2(images).abs().mean(1, keepdim=True)


def smaller(images: Tensor) -> Tensor:
    return nn.functional.interpolate(images, size=(32, 32), mode="bilinear", antialias=True).mean(1, keepdim=True)


def branching(images: Tensor) -> Tensor:
    return images if images.mean() > 0 else -images


@pytest.mark.slow
def test_what_does_not_export(plugin: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"Failed to export the model with torch\.export"):
        foreign(plugin, branching).to_onnx(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("function", [fourier, smaller])
def test_what_openvino_computes_otherwise(plugin: ModuleType, function: Any, tmp_path: Path) -> None:
    """ONNX Runtime agrees with torch; OpenVINO gives another shape, or other values."""
    import onnxruntime
    import openvino

    model, images = foreign(plugin, function), torch.rand(2, 3, 64, 64)
    path, expected = model.to_onnx(tmp_path), model(images).anomaly_map.numpy()
    (there,) = onnxruntime.InferenceSession(path).run(["anomaly_map"], {"input": images.numpy()})
    np.testing.assert_allclose(there, expected, atol=1e-3)
    got = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())["anomaly_map"]
    assert got.shape != expected.shape or np.abs(got - expected).max() > 0.01


def test_exports_resize_without_antialiasing() -> None:
    processor = PreProcessor(Resize((8, 8), antialias=True))
    images = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(processor.transform(images), processor(images), atol=0.1)
