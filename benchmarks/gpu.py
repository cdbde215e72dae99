"""Training of WTFlow, FastFlow, Padim and Patchcore on a GPU.

    python -m benchmarks gpu [--data mvtec_bottle]
    python -m benchmarks gpu --quick                         WTFlow only

Through anomalib's ``Engine``, image decoding included, after a Padim that is not counted, in which CUDA loads.
"""

from argparse import Namespace
from collections.abc import Iterator
from functools import cache, partial

import torch
from lightning.pytorch.callbacks import LambdaCallback

from benchmarks.accuracy import run
from benchmarks.base import Line
from benchmarks.common import Job, machine, table

OPTIONS = {"models": ("WTFlow", "FastFlow", "Padim", "Patchcore"), "data": ("mvtec_bottle",)}
QUICK = {"models": ["WTFlow"]}
KEY = ("gpu", "model", "data")
COLUMNS = {
    "data": "{data}",
    "model": "{model}",
    "training": "{seconds:.1f} s",
    "GPU memory": "{peak_MiB} MiB",
    "image AUROC": "{metrics[image_AUROC]:.4f}",
    "pixel AUROC": "{metrics[pixel_AUROC]:.4f}",
    "AUPRO": "{metrics[pixel_AUPRO]:.4f}",
}


@cache
def warm_up(data: str) -> None:
    """Train and test a model that is not counted."""
    run("Padim", data, accelerator="gpu")


def train(row: str, data: str) -> Line:
    """Train and test a model."""
    warm_up(data)
    torch.cuda.reset_peak_memory_stats()
    peak: list[int] = []
    note_peak = LambdaCallback(on_train_end=lambda *_: peak.append(torch.cuda.max_memory_allocated()))
    result = run(row, data, accelerator="gpu", callbacks=[note_peak])
    return {
        "settings": result["settings"],
        "seconds": result["fit_seconds"],
        "peak_MiB": round(peak[0] / 2**20),
        "metrics": {name: round(value, 4) for name, value in result["metrics"].items()},
        "torch": torch.__version__,
        **machine(),
    }


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the trainings; exit without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here: run this where torch.cuda.is_available().")
    for data in given.data:
        for row in given.models:
            yield {"gpu": torch.cuda.get_device_name(), "model": row, "data": data}, partial(train, row, data)


def render(lines: list[Line]) -> str:
    """Render a table for each GPU."""
    text = []
    for gpu in dict.fromkeys(line["gpu"] for line in lines):
        here = [line for line in lines if line["gpu"] == gpu]
        text += [f"{gpu}, torch {here[0]['torch']}, {here[0]['cpu']}", "", *table(COLUMNS, here)]
    return "\n".join(text)
