"""Accuracy of exported WTFlow models: torch, and OpenVINO in f32, FP16, bf16 and INT8, on whole test sets.

    python -m benchmarks precision [--data mvtec_bottle magnetic_tile]
    python -m benchmarks precision --quick                   bottles

A model is trained with seed 0 as the accuracy benchmark does, exported as ``anomalib export`` does, and run over the
whole test set by OpenVINO. Pixel AUROC is taken on every fourth pixel in each direction, where there are masks. bf16
may lose 0.002 and INT8 0.005 to f32; the exit status is 1 if one loses more.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from anomalib.deploy import CompressionType
from sklearn.metrics import roc_auc_score

from anomalib_wtflow import WTFlow
from benchmarks.base import Line
from benchmarks.common import Job, Promise, Verdict, table, track
from benchmarks.datasets import REAL, data_module, every_fourth_pixel, has_masks
from benchmarks.models import build, quiet_engine

HINTS = {"f32": "f32", "FP16 weights": "f32", "bf16": "bf16", "INT8": "f32"}
"""Which precision the operations that are not quantised run in."""
COMPRESSIONS = {"FP16 weights": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}
KEY = ("data",)
OPTIONS = {"data": REAL}
QUICK = {"data": ["mvtec_bottle"]}
LIMITS = {"bf16": 0.002, "INT8": 0.005}
"""Largest loss of AUROC to f32 that is wanted."""
METRICS = ("image_AUROC", "pixel_AUROC")
COLUMNS = {
    "precision": "{name}",
    "image AUROC": "{image_AUROC:.4f}{image_AUROC_loss}",
    "pixel AUROC": "{pixel_AUROC:.4f}{pixel_AUROC_loss}",
    "file": "{size} MiB",
}


def export_all(model: WTFlow, module: Any, folder: Path) -> dict[str, Path]:
    """Export every variant."""
    paths = {"f32": model.to_openvino(folder / "f32")}
    for name, compression in COMPRESSIONS.items():
        paths[name] = model.to_openvino(folder / name.split()[0], compression_type=compression, datamodule=module)
    return {**paths, "bf16": paths["f32"]}


def auroc(truth: Any, values: dict[str, Any]) -> dict[str, float]:
    """Area under the curve of each precision, as the JSON has it."""
    return {name: round(float(roc_auc_score(truth, np.hstack(parts))), 5) for name, parts in values.items()}


def evaluate(data: str) -> Line:
    """Train, export and test on one data set."""
    module, model = data_module(data), build("WTFlow", data)
    with TemporaryDirectory() as folder:
        quiet_engine(folder).fit(model, datamodule=module)
        paths = export_all(model.eval(), module, Path(folder))
        networks = {
            name: openvino.compile_model(paths[name], "CPU", {"INFERENCE_PRECISION_HINT": hint})
            for name, hint in HINTS.items()
        }
        sizes = {name: round(path.with_suffix(".bin").stat().st_size / 2**20, 2) for name, path in paths.items()}
        scores: dict[str, list[Any]] = {name: [] for name in ("torch", *networks)}
        pixels: dict[str, list[Any]] = {name: [] for name in scores}
        labels, masks = [], []
        for item in track(module.test_data, f"{data}: testing"):
            with torch.inference_mode():
                results: dict[str, Any] = {"torch": model(item.image[None])._asdict()}
            results |= {name: network(item.image[None].numpy()) for name, network in networks.items()}
            for name, result in results.items():
                anomaly_map = np.asarray(result["anomaly_map"])[0, 0]
                scores[name].append(np.asarray(result["pred_score"]).ravel().copy())
                pixels[name].append(anomaly_map[2::4, 2::4].ravel().copy())
            masks.append(every_fourth_pixel(item, anomaly_map.shape).flatten())
            labels.append(bool(item.gt_label))
    line = {"images": len(labels), "sizes_MiB": sizes, "image_AUROC": auroc(labels, scores)}
    return line | ({"pixel_AUROC": auroc(torch.cat(masks).numpy(), pixels)} if has_masks(module) else {})


def render(lines: list[Line]) -> str:
    """Render a Markdown table, losses to f32 in brackets."""
    text = []
    for line in lines:
        rows = []
        for name in line["image_AUROC"]:
            row = {"name": name, **({"size": line["sizes_MiB"][name]} if name in line["sizes_MiB"] else {})}
            for metric, values in ((metric, line[metric]) for metric in METRICS if metric in line):
                loss = "" if name in ("torch", "f32") else f" ({values[name] - values['f32']:+.4f})"
                row |= {metric: values[name], f"{metric}_loss": loss}
            rows.append(row)
        text += [f"**{line['data']}**", "", *table(COLUMNS, rows)]
    return "\n".join(text)


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say which limits are kept."""
    found = []
    for line in lines:
        for name, limit in LIMITS.items():
            for metric in METRICS:
                if metric in line:
                    promise = Promise(f"{line['data']}: {metric} that {name} loses", most=limit, digits=".4f")
                    found.append(promise.verdict(line[metric]["f32"] - line[metric][name]))
    return found


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the data sets."""
    for data in given.data:
        yield {"data": data}, partial(evaluate, data)
