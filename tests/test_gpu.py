"""What only a GPU can show. Skipped without one."""

from pathlib import Path

import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.engine import Engine

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.diagnosis.diagnose import diagnose
from anomalib_wtflow.torch_model import Predictions
from conftest import quiet_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FIELDS = ("pred_score", "anomaly_map")


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, not in TF32, which has ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def train(parts: SyntheticParts, root: Path, epochs: int = 40, **kwargs: object) -> tuple[WTFlow, Engine]:
    model = WTFlow(image_size=128, false_alarm_rate=0.3, max_epochs=epochs, overrides={"plateau": 0.0})
    engine = quiet_engine(root, **kwargs)
    engine.fit(model, datamodule=parts)
    return model, engine


def score(model: WTFlow, images: torch.Tensor, device: str) -> Predictions:
    """Score images on a device in float32, before the post-processing."""
    model = model.eval().to(device)
    with torch.inference_mode():
        return model.model(model.pre_processor(images.to(device)))


def images_of(parts: SyntheticParts) -> torch.Tensor:
    return torch.stack([item.image for item in parts.test_data])


def assert_near(one: Predictions | InferenceBatch, other: Predictions | InferenceBatch, tolerance: float) -> None:
    for field in FIELDS:
        given, expected = (getattr(each, field).cpu() for each in (one, other))
        torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_training(parts: SyntheticParts, tmp_path: Path, precision: str) -> None:
    """Trains and tests; the checkpoint gives on a CPU, in float32, what it gives here."""
    model, engine = train(parts, tmp_path, accelerator="gpu", precision=precision)
    (result,) = engine.test(model, datamodule=parts, verbose=False)
    assert result["image_AUROC"] > 0.95
    loaded = WTFlow.load_from_checkpoint(engine.best_model_path, map_location="cpu")
    images = images_of(parts)
    assert_near(score(model, images, "cuda"), score(loaded, images, "cpu"), 1e-4)
    assert torch.equal(model.post_processor.image_threshold.cpu(), loaded.post_processor.image_threshold)


def test_the_same_twice(parts: SyntheticParts, tmp_path: Path) -> None:
    """On one device, bit by bit."""
    first, again = (train(parts, tmp_path, 3, accelerator="gpu")[0].state_dict() for _ in range(2))
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def test_mixed_precision_is_near_float32(parts: SyntheticParts, tmp_path: Path) -> None:
    """The same weights, in autocast and out of it: eight bits of mantissa leave about one percent."""
    model, _ = train(parts, tmp_path, accelerator="gpu")
    images = images_of(parts)
    whole = score(model, images, "cuda")
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        with torch.autocast("cuda", dtype):
            mixed = score(model, images, "cuda")
        error = (mixed.pred_score.float() - whole.pred_score).abs().max() / whole.pred_score.max()
        assert 0 < error < tolerance, dtype


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(parts: SyntheticParts, tmp_path: Path, mode: str) -> None:
    """torch.compile, with and without CUDA graphs, gives the post-processed results of eager torch."""
    model, _ = train(parts, tmp_path, 2, accelerator="gpu")
    model = model.eval().cuda()
    compiled = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)
    images = images_of(parts)[..., :96].cuda()
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for k in range(3):  # a CUDA graph is recorded in the second call
            assert_near(compiled(images[k : k + 1]), model(images[k : k + 1]), 1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_diagnosis(parts: SyntheticParts, tmp_path: Path) -> None:
    _, engine = train(parts, tmp_path, 2, accelerator="gpu")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    page = diagnose(engine.best_model_path, parts, tmp_path / "page", device="cuda")
    assert Path(page).exists()
    assert torch.cuda.max_memory_allocated() > before + 2**20
