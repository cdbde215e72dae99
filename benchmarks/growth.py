"""How a training's time and memory grow with images, with the images' size, and where an epoch of many products goes.

    python -m benchmarks growth                      all parts
    python -m benchmarks growth --parts images
    python -m benchmarks growth --quick              few images, small ones, two products

Through anomalib's ``Engine``, two epochs, each run in a process of its own. ``images`` are that many good ones in one
anomalib ``Folder`` (a tenth of them validation, a tenth test) with features of noise in the backbone's place, of the
size that 256 x 256 pixels give, so that what is measured is everything but the backbone; ``size`` are 64 drawn parts
and WTFlow's backbone, 16 images a batch. ``before`` are the seconds from the start of the fit to the first epoch:
reading images, the backbone (but for ``images``), normalisation. Memory is the process's peak, ``of it files`` what the
memory-mapped cache has of it at the end, which the machine can take back. ``budget`` are the GiB that the cache may
have of the memory. ``products`` are drawn ones, 24 training images each; what else grows with them is in ``python -m
benchmarks products --parts growth``.
"""

import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.features.cache import FeatureDataset
from anomalib_wtflow.training.calibration import Calibration
from anomalib_wtflow.training.contrast import Contrast
from anomalib_wtflow.training.plateau import Plateau
from benchmarks.base import ROOT, Line, call, peak_MiB
from benchmarks.common import Job, machine_of, table
from benchmarks.products import drawn

PARTS = ("images", "size", "products")
IMAGES = (100, 300, 1000, 3000, 10_000, 20_000)
BUDGET = 4.0
BUDGETS = {3000: (BUDGET, 0.25)}
"""GiB of memory that the cache may take; the second is too small, so that the features are in a file."""
SIZES = (128, 256, 512, 1024)
PRODUCTS = (1, 8, 32)
EPOCHS = 2
KEY = ("part", "count", "budget")
OPTIONS = {"parts": PARTS}
QUICK: dict[str, Any] = {}
FEW = {"images": (100, 300), "size": (128,), "products": (1, 2)}
TIMED = {
    "contrast": (Contrast, "observe"),
    "thresholds": (Calibration, "calibrate"),
    "plateau": (Plateau, "on_train_epoch_end"),
    "validation": (WTFlow, "validation_step"),
}
"""What an epoch does beside its steps, and where."""


class Clock(Callback):
    """Seconds before the first epoch, of each epoch, and of what each does beside its steps."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.before: float | None = None
        self.spent: Counter[str] = Counter()
        self.cache = self.in_files = 0

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Time a function."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - begin  # type: ignore[assignment]

        return timed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when the first epoch begins."""
        del trainer, pl_module
        if self.before is None:
            self.before = time.perf_counter() - self.start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how large the cache is, before it is given back, and how much of the memory is that of files."""
        del pl_module
        module: Any = trainer.datamodule  # type: ignore[attr-defined]
        stores = [each.store for each in (module.train_data, module.val_data) if isinstance(each, FeatureDataset)]
        self.cache = sum(store.rows.numel() * 4 for store in stores if store is not None and store.rows is not None)
        status = Path("/proc/self/status").read_text().splitlines()
        self.in_files = round(int(next(line for line in status if line.startswith("RssFile")).split()[1]) / 1024)


def noise(images: Tensor, channels: int) -> Tensor:
    """Features of noise, as many positions as the backbone has."""
    return torch.randn(len(images), channels, images.shape[-2] // 16, images.shape[-1] // 16)


def tiny(folder: Path, count: int) -> Folder:
    """A folder of good images of 8 x 8 pixels, which are resized."""
    (folder / "good").mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (8, 8), (index % 256, 128, 128)).save(folder / "good" / f"{index:06d}.png")
    return Folder("growth", "good", folder, num_workers=0, seed=0)


def measure(part: str, count: int, budget: float) -> Line:
    """Train in this process, and measure it."""
    import logging

    logging.disable(logging.WARNING)
    size = count if part == "size" else 256
    model = WTFlow(max_epochs=EPOCHS, image_size=size, overrides={"feature_cache": budget})
    with TemporaryDirectory() as folder:
        module: Any
        if part == "images":
            module = tiny(Path(folder) / "data", count)
            model.model.extract = partial(noise, channels=sum(model.model.channels))  # type: ignore[method-assign]
        elif part == "size":
            root = ROOT / "datasets" / "SyntheticParts"
            module = SyntheticParts(root, train_images=64, test_images=16, defect_images=4, side=size)
        else:
            module = drawn(count)
        module.prepare_data()
        clock = Clock()
        for name, (kind, method) in TIMED.items():
            setattr(kind, method, clock.wrap(name, getattr(kind, method)))
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        engine = Engine(default_root_dir=folder, callbacks=[clock], **quiet)
        clock.start = time.perf_counter()
        engine.fit(model, datamodule=module)
        seconds = time.perf_counter() - clock.start
    assert clock.before is not None
    return {
        "trained_on": len(module.train_data),
        "before": round(clock.before, 2),
        "epoch_seconds": round((seconds - clock.before) / EPOCHS, 3),
        "spent": {name: round(clock.spent[name] / EPOCHS, 3) for name in TIMED},
        "MiB": peak_MiB(),
        "in_files": clock.in_files,
        "cache_MB": round(clock.cache / 1e6, 1),
    }


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the runs."""
    for part, counts in {"images": IMAGES, "size": SIZES, "products": PRODUCTS}.items():
        if part in given.parts:
            for count in FEW[part] if given.quick else counts:
                for budget in BUDGETS.get(count, (BUDGET,)):
                    yield {"part": part, "count": count, "budget": budget}, partial(call, measure, part, count, budget)


COLUMNS = {
    "trained on": "{trained_on}",
    "cache": "{cache_MB:.0f} MB",
    "cache may take": "{budget:g} GiB",
    "before the first epoch": "{before:.1f} s",
    "an epoch": "{epoch_seconds:.2f} s",
    **{f"of it {name}": f"{{{name}:.2f}} s" for name in TIMED},
    "peak memory": "{MiB} MiB",
    "of it files": "{in_files} MiB",
}


def render(lines: list[Line]) -> str:
    """A table for each part."""
    text = [machine_of(lines), ""]
    for part, title in {"images": "Images", "size": "Side of the images, pixels", "products": "Products"}.items():
        own = [line for line in lines if line["part"] == part]
        rows = [{**line, **line["spent"]} for line in sorted(own, key=lambda line: (line["count"], -line["budget"]))]
        if rows:
            text += [f"**{title}**", "", *table({title.lower(): "{count}", **COLUMNS}, rows)]
    return "\n".join(text)
