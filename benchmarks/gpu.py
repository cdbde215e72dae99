"""WTFlow on a GPU beside its backbone alone, FastFlow, Padim and Patchcore; and its training in three precisions.

Usage:
    python benchmarks/gpu.py [--data mvtec_bottle]     latency, throughput and trainings, what is missing; JSON
    python benchmarks/gpu.py --render                  the tables of the README, from the JSON

Latency: 256 x 256 images on the GPU, from pre-processing to score and map, until the GPU is done. The variants take
turns as in ``latency.py``, with the same models. ``CUDA graph`` is ``torch.compile(mode="reduce-overhead")``. The share
outside the backbone is one less the median of the ratios of the backbone to the model. float32 is torch's default,
with TF32 in convolutions and without it in matrix products; f16 is ``torch.autocast``. Training: through anomalib's
``Engine`` as in ``training.py``, image decoding included, after an epoch that is not counted, in which CUDA loads.
"""

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import machine, run
from latency import BUILDERS, Variant, interleaved, ratio
from lightning.pytorch.callbacks import LambdaCallback
from lines import append, need, read
from rich.progress import track
from runtimes import draw_images

RESULTS = Path(__file__).parent / "results" / "gpu.json"
GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (tuple(BUILDERS), ("eager",)),
    (("backbone", "WTFlow", "FastFlow"), ("eager, f16",)),
    (("backbone", "WTFlow"), ("CUDA graph", "CUDA graph, f16")),
)
"""Models and runtimes that take turns. Compiling takes minutes, so that group is the last."""
BATCHES = (1, 32)
LARGE = ("Patchcore 3000", "WTFlow 3000")
"""Not measured at batch 32: Patchcore's distances alone would take 40 GB."""
TRAININGS: tuple[tuple[str, str], ...] = (
    ("WTFlow", "32-true"),
    ("WTFlow", "16-mixed"),
    ("WTFlow", "bf16-mixed"),
    ("FastFlow", "32-true"),
    ("Padim", "32-true"),
    ("Patchcore", "32-true"),
)


def load(name: str, runtime: str) -> Callable[[torch.Tensor], None]:
    """Put a model on the GPU; return a call that ends when the GPU is done."""
    network = BUILDERS[name]().cuda()
    if runtime.startswith("CUDA graph"):
        network = torch.compile(network, mode="reduce-overhead", dynamic=False, fullgraph=True)

    def call(images: torch.Tensor) -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=runtime.endswith("f16")):
            network(images)
        torch.cuda.synchronize()

    return call


def hardware() -> dict[str, Any]:
    """Name the GPU and torch's version beside the processor."""
    return {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **machine()}


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """Say what a line of the JSON measured, and where."""
    return tuple(line.get(name) for name in ("gpu", "model", "runtime", "batch", "data", "precision"))


def latency(models: Sequence[str], runtimes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Measure latency and throughput of models that take turns; return a JSON line for each variant."""
    pairs = [(name, runtime) for name in models for runtime in runtimes]
    calls: dict[Variant, Callable[[], None]] = {}
    images = {batch: torch.from_numpy(draw_images(batch)).cuda() for batch in BATCHES}
    for name, runtime in track(pairs, description="Building", transient=True):
        call = load(name, runtime)
        for batch in BATCHES[:1] if name in LARGE else BATCHES:
            for _ in range(3):  # cuDNN chooses, the compiler compiles, and a graph is recorded
                call(images[batch])
            calls[Variant(name, runtime, batch)] = partial(call, images[batch])
    seconds = interleaved(calls, rounds)
    lines = []
    for variant, taken in seconds.items():
        low, middle, high = (1000 * value / variant.batch for value in statistics.quantiles(taken, n=4))
        line = {"model": variant.model, "runtime": variant.runtime, "batch": variant.batch}
        line |= {"ms_an_image": round(middle, 4), "quartiles_ms": [round(low, 4), round(high, 4)], "rounds": rounds}
        reference = Variant("backbone", variant.runtime, variant.batch)
        line["outside_backbone"] = round(1 - ratio(seconds, reference, variant), 3)
        lines.append({**line, **hardware()})
    return lines


def train(row: str, data: str, precision: str, **kwargs: Any) -> dict[str, Any]:
    """Train and test a model, with more arguments for the engine if given."""
    torch.cuda.reset_peak_memory_stats()
    peak: list[int] = []
    note_peak = LambdaCallback(on_train_end=lambda *_: peak.append(torch.cuda.max_memory_allocated()))
    options = {"accelerator": "gpu", "precision": precision, "callbacks": [note_peak], **kwargs}
    result = run(row, data, 0, None, None, **options)
    return {
        "model": row,
        "data": data,
        "precision": precision,
        "settings": result["settings"],
        "seconds": result["fit_seconds"],
        "peak_MiB": round(peak[0] / 2**20),
        "metrics": {name: round(value, 4) for name, value in result["metrics"].items()},
        **hardware(),
    }


def tables(lines: list[dict[str, Any]]) -> str:
    """Render, for each GPU, a table a batch size, one of the trainings, and the shares outside the backbone."""
    gpus = dict.fromkeys(line["gpu"] for line in lines)
    return "\n".join(tables_of([line for line in lines if line["gpu"] == gpu]) for gpu in gpus)


def tables_of(lines: list[dict[str, Any]]) -> str:
    """Render the tables of one GPU."""
    text = [f"{lines[0]['gpu']}, torch {lines[0]['torch']}, {lines[0]['cpu']}", ""]
    for batch in BATCHES if any("batch" in line for line in lines) else ():
        text += [
            f"**batch {batch}**",
            "",
            "| model | runtime | ms an image (quartiles) | images a second | outside the backbone |",
            "|---" * 5 + "|",
        ]
        for line in lines:
            if line.get("batch") == batch:
                low, high = line["quartiles_ms"]
                share = f"{line['outside_backbone']:.0%}" if line["model"] in ("WTFlow", "FastFlow") else ""
                text.append(
                    f"| {line['model']} | {line['runtime']} | {line['ms_an_image']:.3f} ({low:.3f} to {high:.3f}) | "
                    f"{1000 / line['ms_an_image']:.0f} | {share} |"
                )
        text.append("")
    text += [
        "| data | model | precision | training | GPU memory | image AUROC | pixel AUROC | AUPRO |",
        "|---" * 8 + "|",
    ]
    for line in lines:
        if "precision" in line:
            m = line["metrics"]
            text.append(
                f"| {line['data']} | {line['model']} | {line['precision']} | {line['seconds']:.1f} s | "
                f"{line['peak_MiB']} MiB | {m['image_AUROC']:.4f} | {m['pixel_AUROC']:.4f} | {m['pixel_AUPRO']:.4f} |"
            )
    shares = {
        line["runtime"]: line["outside_backbone"]
        for line in lines
        if line.get("batch") == 1 and line["model"] == "WTFlow"
    }
    text += ["", *(f"- outside the backbone, batch 1, {runtime}: {share:.1%}" for runtime, share in shares.items())]
    return "\n".join(text)


def main() -> int:
    """Measure and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mvtec_bottle", help="as for accuracy.py")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if given.render:
        print(tables(need(given.output, "gpu.py")))
        return 0
    if not torch.cuda.is_available():
        print("There is no CUDA device here: run this where torch.cuda.is_available().", file=sys.stderr)
        return 1
    done = read(given.output)
    here = torch.cuda.get_device_name()
    measured = {key(line) for line in done}
    for models, runtimes in GROUPS:
        if {(here, model, runtime, 1, None, None) for model in models for runtime in runtimes} - measured:
            for line in latency(models, runtimes, given.rounds):
                append(given.output, line)
    plan = [pair for pair in TRAININGS if (here, pair[0], None, None, given.data, pair[1]) not in measured]
    if plan:
        train("WTFlow", given.data, "32-true", max_epochs=1)
    for row, precision in track(plan, description="Training", transient=True):
        append(given.output, train(row, given.data, precision))
    print(tables(need(given.output, "gpu.py")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
