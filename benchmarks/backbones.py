"""WTFlow on backbones of each family, and on images of each size: latency, memory, training, the feature cache.

    python -m benchmarks backbones [--parts families sizes]
    python -m benchmarks backbones --quick                   the default backbone and a small transformer, few rounds

Weights are random, which changes no time, so nothing is said about accuracy. Layers are the defaults. All runs on one
thread, and times are the processor's, which other work on the machine moves less than a clock. Latency is that of one
image in torch, of the model's own size, from pre-processing to score and map. A training is one of a few epochs on 32
drawn parts, and its figures are those of an image; so is the cache. Inference and training of a row run in a process
of their own each, whose peak memory is theirs with what is imported.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.deploy.quantization import STEM_CONVOLUTIONS, count_convolutions
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, get_image_size
from anomalib_wtflow.training.feature_caching import text_of
from benchmarks.base import Line, call, peak_MiB
from benchmarks.common import Job, machine_of, table
from benchmarks.models import quiet_engine

FAMILIES = {
    DEFAULT_BACKBONE: ("EfficientNet, the default", None),
    "resnet18": ("ResNet", None),
    "convnext_atto": ("ConvNeXt", None),
    "convnext_tiny": ("ConvNeXt", None),
    "swin_tiny_patch4_window7_224": ("Swin", None),
    "vit_tiny_patch16_224": ("ViT", None),
    "cait_xxs24_224": ("CaiT", None),
    "eva02_tiny_patch14_224": ("EVA-02", None),
    "vit_small_patch16_dinov3": ("DINOv3", None),
    "vit_small_patch14_reg4_dinov2": ("DINOv2, registers", 252),
    "vit_small_patch14_dinov2": ("DINOv2", None),
}
"""By backbone: the family that it stands for, and the side of the images, None for its own."""
SIDES = (256, 384, 512, 768, 1024)
IMAGES, EPOCHS = 32, 4
KEY = ("backbone", "image_size")
OPTIONS = {"rounds": 15, "parts": ("families", "sizes")}
QUICK = {"rounds": 3, "parts": ["quick"]}
ENOUGH = 10.0
"""Seconds after which no further round begins."""
SHARED = {
    "map": "{positions}",
    "ms an image (quartiles)": "{ms_an_image:.1f} ({quartiles_ms[0]:.1f} to {quartiles_ms[1]:.1f})",
    "its peak memory": "{inference_peak_MiB} MiB",
    "training: backbone, once": "{backbone_ms:.1f} ms",
    "an epoch": "{epoch_ms:.1f} ms",
    "its peak": "{training_peak_MiB} MiB",
    "cache": "{cache}",
}
COLUMNS = {
    "family": "{family}",
    "backbone": "`{backbone}`",
    "images": "{image_size}",
    "default layers": "{layer_names}",
    "channels": "{widths}",
    **SHARED,
    "INT8": "{int8}",
}
SIZE_COLUMNS = {"images": "{image_size}", **SHARED}


def build(backbone: str, side: int | None, **kwargs: Any) -> WTFlow:
    """Build a model with random weights."""
    return WTFlow(backbone, pre_trained=False, image_size=side, **kwargs)


def inference(backbone: str, side: int | None, rounds: int) -> Line:
    """Measure the latency of one image in this process, and say what the backbone gives."""
    torch.set_num_threads(1)
    model = build(backbone, side).eval()
    extractor = model.model.feature_extractor
    image, seconds = torch.rand(1, 3, *get_image_size(backbone, side)), []
    with torch.inference_mode():
        features = model.model.extract(image)
        model.model.update(features + torch.randn(4, *features.shape[1:]), torch.zeros(4, dtype=torch.int64))
        model.model.finalize()
        model.post_processor._image_threshold.fill_(0.5)
        model.post_processor._pixel_threshold.fill_(0.5)
        model(image)
        while len(seconds) < rounds and sum(seconds) < ENOUGH:
            start = time.process_time()
            model(image)
            seconds.append(time.process_time() - start)
    peak = peak_MiB()
    low, middle, high = (round(1000 * each, 2) for each in statistics.quantiles(seconds, n=4, method="inclusive"))
    return {
        "layers": extractor.network.feature_info.module_name(),
        "channels": extractor.channels,
        "map": list(features.shape[-2:]),
        "cache_bytes": features.numel() * features.element_size(),
        "convolutions": count_convolutions(extractor),
        "ms_an_image": middle,
        "quartiles_ms": [low, high],
        "rounds": len(seconds),
        "inference_peak_MiB": peak,
    }


def training(backbone: str, side: int | None) -> Line:
    """Measure a short training in this process: the backbone's time an image, and the flow's an image and epoch."""
    torch.set_num_threads(1)
    model = build(backbone, side, max_epochs=EPOCHS, overrides={"plateau": 0.0})
    extract, passed = model.model.extract, []

    def timed(images: torch.Tensor) -> torch.Tensor:
        start = time.process_time()
        features = extract(images)
        passed.append((time.process_time() - start, len(images)))
        return features

    model.model.extract = timed  # type: ignore[method-assign]
    with TemporaryDirectory() as folder:
        parts = SyntheticParts(folder, train_images=IMAGES, test_images=4, defect_images=1, side=256)
        ends: list[float] = []
        clock = LambdaCallback(on_train_epoch_end=lambda *_: ends.append(time.process_time()))
        engine = quiet_engine(folder, callbacks=[clock])
        engine.fit(model, datamodule=parts)
        trained_on = len(model.trainer.train_dataloader.dataset)
    epochs = [after - before for before, after in pairwise(ends)]
    return {
        "backbone_ms": round(1000 * sum(taken for taken, _ in passed) / sum(count for _, count in passed), 2),
        "epoch_ms": round(1000 * statistics.median(epochs) / trained_on, 2),
        "training_images": trained_on,
        "epochs": EPOCHS,
        "training_peak_MiB": peak_MiB(),
    }


def measure(backbone: str, side: int | None, rounds: int) -> Line:
    """Measure a row, each half in a process of its own."""
    return {**call(inference, backbone, side, rounds), **call(training, backbone, side)}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the rows."""
    torch.set_num_threads(1)  # what is said of the machine
    rows: list[tuple[str, int | None]] = []
    if "families" in given.parts:
        rows += [(backbone, side) for backbone, (_, side) in FAMILIES.items()]
    if "sizes" in given.parts:
        rows += [(DEFAULT_BACKBONE, side) for side in SIDES]
    if "quick" in given.parts:
        rows = [(DEFAULT_BACKBONE, None), ("vit_tiny_patch16_224", 64)]
    for backbone, side in rows:
        size = " x ".join(map(str, get_image_size(backbone, side)))
        yield {"backbone": backbone, "image_size": size}, partial(measure, backbone, side, given.rounds)


def render(lines: list[Line]) -> str:
    """Render a table of the families, and one of the default backbone's sizes."""
    rows = [
        {
            **line,
            "family": FAMILIES[line["backbone"]][0],
            "layer_names": ", ".join(line["layers"]),
            "widths": ", ".join(map(str, line["channels"])),
            "positions": " x ".join(map(str, line["map"])),
            "cache": text_of(line["cache_bytes"]),
            "int8": "yes" if line["convolutions"] > STEM_CONVOLUTIONS else "refused",
        }
        for line in lines
    ]
    sizes = [row for row in rows if row["backbone"] == DEFAULT_BACKBONE]
    own = [row for row in rows if row["backbone"] != DEFAULT_BACKBONE or row["image_size"] == "256 x 256"]
    return "\n".join([machine_of(lines), "", *table(COLUMNS, own), *table(SIZE_COLUMNS, sizes)])
