"""The models whose speed is measured, untrained, the runtimes that they are opened in, and timing in turns."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.models import Padim, Patchcore
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn

from anomalib_wtflow import WTFlow
from anomalib_wtflow.deploy.quantization import count_convolutions, keep_precise, quantize
from anomalib_wtflow.features.backbone import FeatureExtractor
from benchmarks.base import Line
from benchmarks.common import track
from benchmarks.models import IMAGE_SIZE, LiteFastflow, neighbours, packaged_network, with_statistics
from benchmarks.runtimes import OPENERS, Call, draw_images

SIZE = (IMAGE_SIZE, IMAGE_SIZE)
POSITIONS = (IMAGE_SIZE // 8) ** 2
BANKS = (100, 300, 658, 3000)
CHANNELS = 152
"""Of strides 8 and 16, which anomalib's models use."""
PAUSE = 0.05
"""Seconds between two turns."""
REPEATS, ENOUGH = 5, 0.1
"""Timed calls of a turn, and the seconds after which no further one begins."""


class Variant(NamedTuple):
    """A model in a runtime at a batch size."""

    model: str
    runtime: str = "torch"
    batch: int = 1


class Backbone(nn.Module):
    """WTFlow's backbone as WTFlow runs it, a few images at a time, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps."""
        return self.feature_extractor._maps(images.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def wtflow() -> WTFlow:
    """WTFlow with statistics of noise."""
    model = WTFlow().eval()
    return with_statistics(model, model.model.extract(torch.randn(8, 3, *SIZE)), torch.zeros(8, dtype=torch.int64))


def baseline(build: Callable[..., Any], **kwargs: Any) -> Any:
    """Build one of anomalib's models with anomalib's own processing, with limits, so that it does all its work."""
    processing = {"pre_processor": WTFlow.configure_pre_processor(IMAGE_SIZE), "post_processor": PostProcessor()}
    model = build(**kwargs, **processing, evaluator=False, visualizer=False)
    for name, buffer in model.post_processor.named_buffers():
        buffer.fill_(0.0 if name.endswith("min") else 1.0 if name.endswith("max") else 0.5)
    return model.eval()


def patchcore(images: int) -> Any:
    """Patchcore with a bank of random rows, as many as 10 % of the images' patches."""
    model = baseline(partial(neighbours, Patchcore))
    model.model.memory_bank = torch.randn(images * POSITIONS // 10, CHANNELS)
    return model


def padim() -> Any:
    """Padim with random statistics."""
    model = baseline(partial(neighbours, Padim), n_features=100)
    model.model.gaussian.mean = torch.randn(100, POSITIONS)
    model.model.gaussian.inv_covariance = torch.eye(100).repeat(POSITIONS, 1, 1)
    return model


BUILDERS: dict[str, Callable[[], Any]] = {
    "backbone": lambda: Backbone().eval(),
    "backbone (timm)": lambda: packaged_network().eval(),
    "WTFlow": wtflow,
    "FastFlow": partial(baseline, LiteFastflow),
    "Padim": padim,
    **{f"Patchcore {images}": partial(patchcore, images) for images in BANKS},
}


def to_onnx(model: Any, folder: Path) -> Path:
    """Export with a free batch size; anomalib's own models for one image, since their free size is not always free."""
    if not isinstance(model, Backbone):
        shapes: dict[str, Any] = {} if isinstance(model, WTFlow) else {"dynamic_shapes": None}
        return model.to_onnx(folder, input_size=SIZE, **shapes)
    path, options = folder / "model.onnx", {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    torch.onnx.export(model, (torch.zeros(2, 3, *SIZE),), path, dynamo=True, input_names=["input"], **options)
    return path


def to_openvino(precision: str, model: Any, folder: Path) -> Path:
    """Export to OpenVINO with weights of a precision."""
    import openvino

    network = openvino.convert_model(to_onnx(model, folder))
    extractor = (model if isinstance(model, Backbone) else model.model).feature_extractor
    if precision == "INT8":
        noise = [np.random.default_rng(k).random((1, 3, *SIZE), np.float32) for k in range(8)]
        network = quantize(network, noise, count_convolutions(extractor))
    path = folder / "openvino" / "model.xml"
    openvino.save_model(network, path, compress_to_fp16=precision == "FP16")
    if isinstance(extractor, FeatureExtractor):
        keep_precise(path, count_convolutions(extractor))
    return path


EXPORTS: dict[str, Callable[[Any, Path], Path]] = {
    "onnxruntime": to_onnx,
    **{name: partial(to_openvino, name.split()[1]) for name in OPENERS if name.startswith("OpenVINO")},
}


def in_torch(network: Any) -> Call:
    """Return a call of a module."""

    def call(batch: np.ndarray) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(batch))

    return call


def load(name: str, runtime: str, folder: Path) -> tuple[Call, Path | None]:
    """Open a model in a runtime; return the call, and the exported file if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    path, model = None, BUILDERS[name]()
    if runtime in EXPORTS:
        path = EXPORTS[runtime](model, folder)
        call = OPENERS[runtime](path)
    else:
        if runtime == "torch.compile":
            model.forward = torch.compile(model.forward, dynamic=False)
        call = in_torch(model)
    call(draw_images(1))
    return call, path


def interleaved(calls: dict[Variant, Callable[[], Any]], rounds: int) -> dict[Variant, list[float]]:
    """Seconds of each call in each round, after a round that is not counted.

    The calls take turns, forwards and backwards, so that a drift of the machine falls on both sides of a ratio. Each
    comes after a pause in which the threads of the runtime before it stop spinning, and several times: the first, not
    timed, brings its weights back into the processor's caches. A machine that runs one model has neither another's
    threads nor another's weights. What counts is the median of the others.
    """
    seconds: dict[Variant, list[float]] = {variant: [] for variant in calls}
    for turn in track(range(rounds + 1), "Measuring"):
        order = list(calls.items())
        for variant, call in order if turn % 2 else order[::-1]:
            time.sleep(PAUSE)
            call()
            taken: list[float] = []
            while len(taken) < REPEATS and sum(taken) < ENOUGH:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            if turn:
                seconds[variant].append(statistics.median(taken))
    return seconds


def ratio(seconds: dict[Variant, list[float]], above: Variant, below: Variant) -> float:
    """Median over the rounds of the ratio of two variants."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def summary(variant: Variant, seconds: list[float], images: int, digits: int) -> Line:
    """Return the median milliseconds of an image with their quartiles, as the JSON has them."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
    low, middle, high = (round(1000 * value / images, digits) for value in quartiles)
    return {**variant._asdict(), "ms_an_image": middle, "quartiles_ms": [low, high], "rounds": len(seconds)}
