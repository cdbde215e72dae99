"""Accuracy of exported WTFlow models: torch, and OpenVINO in f32, FP16, bf16 and INT8, on whole test sets.

Usage:
    python benchmarks/precision.py [--data mvtec_bottle magnetic_tile] [--output JSON]
    python benchmarks/precision.py --render

A model is trained with seed 0 as ``accuracy.py`` does, exported as ``anomalib export`` does, and run over the whole
test set by OpenVINO. ``INT8, all`` quantises the flow and the score too, which WTFlow's own export does not. Pixel
AUROC is taken on every fourth pixel in each direction. One JSON line a data set.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from accuracy import machine
from anomalib.deploy import CompressionType
from lightning import seed_everything
from lines import append, read
from rich.progress import track
from rows import data_module, quiet_engine
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from anomalib_wtflow import WTFlow

RESULTS = Path(__file__).parent / "results" / "precision.json"
DATA = ("mvtec_bottle", "magnetic_tile")
HINTS = {"f32": "f32", "FP16 weights": "f32", "bf16": "bf16", "INT8": "f32", "INT8, all": "f32"}
"""Which precision the operations that are not quantised run in."""
COMPRESSIONS = {"FP16 weights": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}
LIMITS = {"bf16": 0.002, "INT8": 0.005}
"""Largest loss of AUROC to f32 that is wanted."""


def train(data: str) -> tuple[WTFlow, Any]:
    """Train with seed 0, and return the model and its data module."""
    seed_everything(0, verbose=False)
    model, module = WTFlow(visualizer=False), data_module(data)
    with TemporaryDirectory() as folder:
        engine = quiet_engine(folder)
        engine.fit(model, datamodule=module)
    return model.eval(), module


def export_all(model: WTFlow, module: Any, folder: Path) -> dict[str, Path]:
    """Export every variant but ``INT8, all``, which is made by NNCF, with its defaults but for the biases."""
    import nncf

    paths = {"f32": model.to_openvino(folder / "f32")}
    for name, compression in COMPRESSIONS.items():
        paths[name] = model.to_openvino(folder / name.split()[0], compression_type=compression, datamodule=module)
    paths["bf16"] = paths["f32"]
    loader = module.train_dataloader()
    batches = [np.asarray(batch.image) for batch in loader]
    # NNCF's correction of the biases fails on the density's convolution ("cannot reshape array of size 3").
    options = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    graph = openvino.Core().read_model(paths["f32"])
    whole = nncf.quantize(graph, nncf.Dataset(batches), advanced_parameters=options)
    paths["INT8, all"] = folder / "whole.xml"
    openvino.save_model(whole, paths["INT8, all"], compress_to_fp16=False)
    return paths


def evaluate(data: str) -> dict[str, Any]:
    """Train, export and test on one data set."""
    model, module = train(data)
    with TemporaryDirectory() as folder:
        paths = export_all(model, module, Path(folder))
        compiled = {
            name: openvino.compile_model(paths[name], "CPU", {"INFERENCE_PRECISION_HINT": hint})
            for name, hint in HINTS.items()
        }
        sizes = {name: round(path.with_suffix(".bin").stat().st_size / 2**20, 2) for name, path in paths.items()}
        scores: dict[str, list[float]] = {name: [] for name in ("torch", *compiled)}
        pixels: dict[str, list[np.ndarray]] = {name: [] for name in scores}
        labels, masks = [], []
        for item in track(module.test_data, description=f"{data}: testing", transient=True):
            image = item.image[None].numpy()
            with torch.no_grad():
                results = {"torch": {k: v.numpy() for k, v in model(item.image[None])._asdict().items()}}
            results |= {name: network(image) for name, network in compiled.items()}
            for name, result in results.items():
                scores[name].append(float(np.asarray(result["pred_score"]).squeeze()))
                pixels[name].append(np.asarray(result["anomaly_map"])[0, 0, 2::4, 2::4].ravel().copy())
            side = results["torch"]["anomaly_map"].shape[-2:]
            mask = torch.zeros(side) if item.gt_mask is None else item.gt_mask.squeeze().float()
            masks.append(F.interpolate(mask[None, None], side, mode="nearest")[0, 0, 2::4, 2::4].flatten() > 0.5)
            labels.append(bool(item.gt_label))
    truth = torch.cat(masks).numpy()
    return {
        "data": data,
        "images": len(labels),
        "sizes_MiB": sizes,
        "image_AUROC": {name: round(float(roc_auc_score(labels, values)), 5) for name, values in scores.items()},
        "pixel_AUROC": {
            name: round(float(roc_auc_score(truth, np.concatenate(values))), 5) for name, values in pixels.items()
        },
        "machine": machine(),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Render a Markdown table, losses to f32 in brackets."""
    text = []
    for line in lines:
        text += [f"**{line['data']}**", "", "| precision | image AUROC | pixel AUROC | file |", "|---|---|---|---|"]
        for name in line["image_AUROC"]:
            cells = []
            for metric in ("image_AUROC", "pixel_AUROC"):
                value, full = line[metric][name], line[metric]["f32"]
                cells.append(f"{value:.4f}" + ("" if name in ("torch", "f32") else f" ({value - full:+.4f})"))
            size = line["sizes_MiB"].get(name)
            text.append(f"| {name} | {' | '.join(cells)} | {'' if size is None else f'{size} MiB'} |")
        text.append("")
    return "\n".join(text)


def missed(lines: list[dict[str, Any]]) -> list[str]:
    """Say which limits are missed."""
    return [
        f"{line['data']}: {name} loses {line[metric]['f32'] - line[metric][name]:.4f} {metric}, more than {limit}"
        for line in lines
        for name, limit in LIMITS.items()
        for metric in ("image_AUROC", "pixel_AUROC")
        if line[metric]["f32"] - line[metric][name] > limit
    ]


def main() -> int:
    """Measure and render; the exit status says whether a limit was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    if not given.render:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        known = {line["data"]: line for line in read(given.output)}
        known |= {data: evaluate(data) for data in given.data}
        given.output.unlink(missing_ok=True)
        for line in known.values():
            append(given.output, line)
    lines = read(given.output)
    print(table(lines))
    faults = missed(lines)
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
