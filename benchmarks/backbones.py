"""WTFlow on backbones of each family, and on images of each size: latency, memory, training, the features' size.

    python -m benchmarks backbones
    python -m benchmarks backbones --quick                   the default backbone and a small transformer, few rounds

Weights are random, which changes no time, so nothing is said about accuracy. Layers are the defaults. All runs on one
thread, and times are the processor's, which other work on the machine moves less than a clock. Latency is that of one
image in torch, of the model's own size, from pre-processing to score and map. A training is one of a few epochs on 32
drawn parts, and its figures are those of an image; so are the features. Inference and training of a row run in a
process of their own each, whose peak memory is theirs with what is imported.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.deploy.quantization import STEM_CONVOLUTIONS, count_convolutions
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE, get_image_size
from benchmarks.base import Line, call, peak_MiB
from benchmarks.common import Job, machine_of, table
from benchmarks.models import quiet_engine, timed_fit, with_statistics

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
SIDES = (384, 512, 768, 1024)
IMAGES, EPOCHS = 32, 4
KEY = ("backbone", "image_size")
OPTIONS = {"rounds": 15}
QUICK = {"rounds": 3}
ENOUGH = 10.0
"""Seconds after which no further round begins."""
COLUMNS = {
    "family": "{family}",
    "backbone": "`{backbone}`",
    "images": "{image_size}",
    "default layers": "{layer_names}",
    "channels": "{widths}",
    "map": "{positions}",
    "ms an image (quartiles)": "{ms_an_image:.1f} ({quartiles_ms[0]:.1f} to {quartiles_ms[1]:.1f})",
    "its peak memory": "{inference_peak_MiB} MiB",
    "training: backbone, once": "{backbone_ms:.1f} ms",
    "an epoch": "{epoch_ms:.1f} ms",
    "its peak": "{training_peak_MiB} MiB",
    "features": "{kB:.1f} kB",
    "INT8": "{int8}",
}


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
        with_statistics(model, features + torch.randn(4, *features.shape[1:]), torch.zeros(4, dtype=torch.int64))
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
        "feature_bytes": features.numel() * features.element_size(),
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
        fits = timed_fit(model, time.process_time)
        quiet_engine(folder).fit(model, datamodule=parts)
    trained_on = len(model.marks["training"])
    return {
        "backbone_ms": round(1000 * sum(taken for taken, _ in passed) / sum(count for _, count in passed), 2),
        "epoch_ms": round(1000 * fits[0] / EPOCHS / trained_on, 2),
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
    rows = [(backbone, side) for backbone, (_, side) in FAMILIES.items()]
    rows += [(DEFAULT_BACKBONE, side) for side in SIDES]
    if given.quick:
        rows = [(DEFAULT_BACKBONE, None), ("vit_tiny_patch16_224", 64)]
    for backbone, side in rows:
        size = " x ".join(map(str, get_image_size(backbone, side)))
        yield {"backbone": backbone, "image_size": size}, partial(measure, backbone, side, given.rounds)


def render(lines: list[Line]) -> str:
    """Render a table of the families, and of the default backbone's sizes."""
    rows = [
        {
            **line,
            "family": FAMILIES[line["backbone"]][0],
            "layer_names": ", ".join(line["layers"]),
            "widths": ", ".join(map(str, line["channels"])),
            "positions": " x ".join(map(str, line["map"])),
            "kB": line["feature_bytes"] / 1000,
            "int8": "yes" if line["convolutions"] > STEM_CONVOLUTIONS else "refused",
        }
        for line in lines
    ]
    return "\n".join([machine_of(lines), "", *table(COLUMNS, rows)])
