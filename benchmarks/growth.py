"""How training grows with images, with the images' size, and with products: seconds of collection and fit, memory.

    python -m benchmarks growth                      all parts
    python -m benchmarks growth --parts images
    python -m benchmarks growth --quick              few images, small ones, two products

Through anomalib's ``Engine``, each run in a process of its own, whose peak memory is given. ``images`` are good ones in
one anomalib ``Folder``, with features of noise in the backbone's place, of the size that 256 x 256 pixels give, and a
fit of two epochs. ``feature_memory`` holds the features of 25,000 images, so more of them take no more memory and no
longer fit: 100,000 may take 1.1 times the memory of 25,000. ``size`` are 64 drawn parts and WTFlow's backbone, two
epochs. ``products`` are drawn ones, 24 training images each, and a fit of 30 epochs; each model is tested on each
product, and WTFlow at its own thresholds.
"""

import logging
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import Folder
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomalib_wtflow import Products, SyntheticParts, WTFlow
from benchmarks.base import ROOT, Line, call, peak_MiB
from benchmarks.common import Job, Promise, Verdict, machine_of, table
from benchmarks.models import build, model_bytes, quiet_engine, timed_fit

PARTS = ("images", "size", "products")
IMAGES = (100, 1000, 10_000, 25_000, 100_000)
FILLED = 25_000
"""Images whose features fill the budget."""
SIZES = (128, 256, 512, 1024)
PRODUCTS = {"WTFlow": (1, 8, 32), "Patchcore": (1, 8)}
"""The greedy coreset's time grows with the square of the images."""
ROW_BYTES = 4 * 176 * 16 * 16
DRAWN = ROOT / "datasets" / "SyntheticParts"
KEY = ("part", "model", "count", "filled")
OPTIONS = {"parts": PARTS}
FEW: dict[str, tuple[int, ...]] = {"images": (100, 400), "size": (128,)}
CONSTANT = Promise("Memory of 100,000 images / of 25,000", most=1.1)


def noise(images: Tensor) -> Tensor:
    """Features of noise, as many as the default backbone has."""
    return torch.randn(len(images), 176, images.shape[-2] // 16, images.shape[-1] // 16)


def tiny(folder: Path, count: int) -> Folder:
    """A folder of good images of 8 x 8 pixels, which are resized, and some to test on."""
    for name, images in (("good", count), ("test", 4)):
        (folder / name).mkdir(parents=True)
        for k in range(images):
            Image.new("RGB", (8, 8), (k % 256, 128, 128)).save(folder / name / f"{k:06d}.png")
    options = {"num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder("growth", "good", folder, normal_test_dir="test", **options)


def grow(part: str, count: int, filled: int) -> Line:
    """Train on so many images, or on images of that side, in this process, and measure it."""
    logging.disable(logging.WARNING)
    size = count if part == "size" else 256
    overrides = {"feature_memory": filled * ROW_BYTES / 2**30}
    model = WTFlow(max_epochs=2, image_size=size, overrides=overrides, visualizer=False)
    fits = timed_fit(model)
    with TemporaryDirectory() as folder:
        module: Any
        if part == "images":
            module = tiny(Path(folder) / "data", count)
            model.model.extract = noise  # type: ignore[method-assign]
        else:
            module = SyntheticParts(DRAWN, train_images=64, test_images=16, defect_images=4, side=size)
        module.prepare_data()
        start = time.perf_counter()
        quiet_engine(folder).fit(model, datamodule=module)
        seconds = time.perf_counter() - start
    kept = len(model.marks["training"]) + len(model.marks["calibration"])
    return {"kept": kept, **parted(seconds, fits), "MiB": peak_MiB()}


def parted(seconds: float, fits: list[float]) -> Line:
    """Return the seconds of the whole, of the collection and of the fit, as far as they are known."""
    line = {"fit_seconds": round(seconds, 2)}
    return {**line, "collected": round(seconds - fits[0], 2), "fitted": round(fits[0], 2)} if fits else line


def drawn(count: int) -> Products:
    """Drawn products, as many as asked for."""
    images = {"train_images": 24, "test_images": 8, "defect_images": 4}
    return Products(members={f"product {k:02d}": SyntheticParts(DRAWN, product=k, **images) for k in range(count)})


def grow_products(row: str, count: int) -> Line:
    """Train one model on so many drawn products in this process, and test it on each."""
    logging.disable(logging.WARNING)
    products = drawn(count)
    products.prepare_data()
    model = build(row, "drawn", **({"max_epochs": 30} if row == "WTFlow" else {}))
    fits = timed_fit(model) if row == "WTFlow" else []
    values, counts = [], dict.fromkeys(("good", "false_alarms", "recognised"), 0)
    with TemporaryDirectory() as folder:
        engine = quiet_engine(folder)
        begin = time.perf_counter()
        engine.fit(model, datamodule=products)
        seconds, memory = time.perf_counter() - begin, peak_MiB()
        for name, member in products.members.items():
            batches = engine.predict(model, datamodule=member)
            labels = torch.cat([batch.gt_label for batch in batches]).bool()
            values.append(float(roc_auc_score(labels, torch.cat([batch.pred_score for batch in batches]))))
            for batch in batches if row == "WTFlow" else ():
                good = ~batch.gt_label.bool()
                counts["good"] += int(good.sum())
                counts["false_alarms"] += int(batch.pred_label[good].sum())
                named = torch.tensor([each == name for each in batch.recognition.names(model.products)])
                counts["recognised"] += int(named[good].sum())
    line = {"image_AUROC": round(statistics.mean(values), 5), "least": round(min(values), 5)}
    line |= {**parted(seconds, fits), "MiB": memory, "bytes": model_bytes(model)}
    return line | (counts if row == "WTFlow" else {})


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the runs."""
    filled = FEW["images"][0] if given.quick else FILLED
    for part, counts in {"images": IMAGES, "size": SIZES}.items():
        for count in FEW[part] if given.quick else counts:
            if part in given.parts:
                gives = {"part": part, "model": "WTFlow", "count": count, "filled": filled}
                yield gives, partial(call, grow, part, count, filled)
    for row, counts in PRODUCTS.items():
        for count in (1, 2) if given.quick else counts:
            if "products" in given.parts:
                yield {"part": "products", "model": row, "count": count}, partial(call, grow_products, row, count)


COLUMNS = {
    "kept": "{kept}",
    "collection": "{collected:.1f} s",
    "fit": "{fitted:.1f} s",
    "all": "{fit_seconds:.1f} s",
    "peak memory": "{MiB} MiB",
}
PRODUCT_COLUMNS = {
    "model": "{model}",
    "products": "{count}",
    "image AUROC": "{image_AUROC:.4f}",
    "least": "{least:.4f}",
    "size": "{MB:.2f} MB",
    **{title: form for title, form in COLUMNS.items() if title != "kept"},
    "good images recognised": "{recognised} of {good}",
    "false alarms": "{false_alarms}",
}


def render(lines: list[Line]) -> str:
    """Render a table for each part."""
    text = [machine_of(lines), ""]
    for part, title in {"images": "Images", "size": "Side of the images, pixels"}.items():
        rows = sorted((line for line in lines if line["part"] == part), key=lambda line: line["count"])
        text += [f"**{title}**", "", *table({title.lower(): "{count}", **COLUMNS}, rows)] if rows else []
    rows = [{**line, "MB": line["bytes"] / 1e6} for line in lines if line["part"] == "products"]
    text += ["**Drawn products**", "", *table(PRODUCT_COLUMNS, rows)] if rows else []
    return "\n".join(text)


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say whether memory is constant beyond the budget, where that was measured."""
    memory = {line["count"]: line["MiB"] for line in lines if line["part"] == "images"}
    if not {FILLED, IMAGES[-1]} <= memory.keys():
        return []
    return [CONSTANT.verdict(memory[IMAGES[-1]] / memory[FILLED])]
