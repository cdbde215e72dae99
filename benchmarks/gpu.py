"""WTFlow on a GPU beside its backbone alone, FastFlow, Padim and Patchcore: latency, throughput and training.

    python -m benchmarks gpu [--data mvtec_bottle]           all of it
    python -m benchmarks gpu --quick                         without compiling, few rounds, one training

Latency: 256 x 256 images on the GPU, from pre-processing to score and map, until the GPU is done. The variants take
turns as in the latency benchmark, with the same models. ``CUDA graph`` is ``torch.compile(mode="reduce-overhead")``.
The share outside the backbone is one less the median of the ratios of the backbone to the model. float32 is torch's
default, with TF32 in convolutions and without it in matrix products; f16 is ``torch.autocast``. Training: through
anomalib's ``Engine``, image decoding included, after a Padim that is not counted, in which CUDA loads.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback

from benchmarks.accuracy import run
from benchmarks.base import Line
from benchmarks.candidates import BUILDERS, Variant, interleaved, on_gpu, ratio, summary
from benchmarks.common import Job, machine, table, track
from benchmarks.runtimes import draw_images

GROUPS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "eager": (tuple(BUILDERS), ("eager",)),
    "f16": (("backbone", "WTFlow", "FastFlow"), ("eager, f16",)),
    "CUDA graph": (("backbone", "WTFlow"), ("CUDA graph", "CUDA graph, f16")),
}
"""Models and runtimes that take turns. Compiling takes minutes, so that group is the last."""
BATCHES = (1, 32)
LARGE = ("Patchcore 3000",)
"""Not measured at batch 32: the distances alone would take 40 GB."""
OPTIONS = {
    "parts": (*GROUPS, "training"),
    "models": ("WTFlow", "FastFlow", "Padim", "Patchcore"),
    "data": ("mvtec_bottle",),
    "rounds": 15,
}
QUICK = {"parts": ["eager", "training"], "models": ["WTFlow"], "rounds": 3}
KEY = ("gpu", "model", "runtime", "batch", "data")
SPEED = {
    "model": "{model}",
    "runtime": "{runtime}",
    "ms an image (quartiles)": "{ms_an_image:.3f} ({quartiles_ms[0]:.3f} to {quartiles_ms[1]:.3f})",
    "images a second": "{images:.0f}",
    "outside the backbone": "{outside_backbone:.1%}",
}
TRAINING = {
    "data": "{data}",
    "model": "{model}",
    "training": "{seconds:.1f} s",
    "GPU memory": "{peak_MiB} MiB",
    "image AUROC": "{metrics[image_AUROC]:.4f}",
    "pixel AUROC": "{metrics[pixel_AUROC]:.4f}",
    "AUPRO": "{metrics[pixel_AUPRO]:.4f}",
}


def hardware() -> dict[str, Any]:
    """Name the GPU and torch's version beside the processor."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **machine()}


def latency(variants: Sequence[Variant], rounds: int) -> list[Line]:
    """Measure latency and throughput of variants that take turns; return a JSON line for each."""
    calls: dict[Variant, Callable[[], None]] = {}
    opened: dict[tuple[str, str], Callable[[torch.Tensor], None]] = {}
    images = {batch: torch.from_numpy(draw_images(batch)).cuda() for batch in BATCHES}
    for variant in track(variants, "Building"):
        if variant[:2] not in opened:
            opened[variant[:2]] = on_gpu(BUILDERS[variant.model](), variant.runtime)
        calls[variant] = partial(opened[variant[:2]], images[variant.batch])
        for _ in range(3):  # cuDNN chooses, the compiler compiles, and a graph is recorded
            calls[variant]()
    seconds = interleaved(calls, rounds)
    lines = []
    for variant, taken in seconds.items():
        share = round(1 - ratio(seconds, variant._replace(model="backbone"), variant), 3)
        own = {"outside_backbone": share} if variant.model in ("WTFlow", "FastFlow") else {}
        lines.append({**summary(variant, taken, variant.batch, 4), **own, **hardware()})
    return lines


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
        **hardware(),
    }


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the groups that take turns, and the trainings; exit without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here: run this where torch.cuda.is_available().")
    here = {"gpu": torch.cuda.get_device_name()}
    for models, runtimes in (group for name, group in GROUPS.items() if name in given.parts):
        pairs = [(model, runtime) for model in models for runtime in runtimes]
        variants = [Variant(*pair, batch) for pair in pairs for batch in BATCHES if batch == 1 or pair[0] not in LARGE]
        yield [{**here, **variant._asdict()} for variant in variants], partial(latency, variants, given.rounds)
    for data in given.data if "training" in given.parts else ():
        for row in given.models:
            yield {**here, "model": row, "data": data}, partial(train, row, data)


def render(lines: list[Line]) -> str:
    """Render, for each GPU, a table a batch size, and one of the trainings."""
    text = []
    for gpu in dict.fromkeys(line["gpu"] for line in lines):
        here = [line for line in lines if line["gpu"] == gpu]
        text += [f"{gpu}, torch {here[0]['torch']}, {here[0]['cpu']}", ""]
        timed = [{**line, "images": 1000 / line["ms_an_image"]} for line in here if "batch" in line]
        for batch in dict.fromkeys(line["batch"] for line in timed):
            text += [f"**batch {batch}**", "", *table(SPEED, [line for line in timed if line["batch"] == batch])]
        text += table(TRAINING, [line for line in here if "data" in line])
    return "\n".join(text)
