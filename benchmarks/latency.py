"""Latency of WTFlow from image to score and map, beside its backbone alone, FastFlow, Padim and Patchcore.

    python -m benchmarks latency                             the tables and the promises
    python -m benchmarks latency --quick                     the promises, in under three minutes

256 x 256 images in memory. The variants take turns in one process, so that what else runs on the machine hits all
alike; a ratio is the median over the rounds of the ratios within a round. Memory comes from a process of its own for
each model and runtime: where the model is exported, without torch, and with the time from the start of the import of
the runtime to the first result. anomalib's models are exported for one image, WTFlow and its backbone with a free
batch size. Models are not trained, which changes no time: a Patchcore bank of n images has the size that anomalib's
default coreset, 10 %, gives it. ``backbone`` is WTFlow's own, folded and cut behind its last layer; ``backbone
(timm)`` is the same as timm builds it, which the other models run. The exit status is 1 if a promise is missed.
"""

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import runtimes
from benchmarks.base import Line, call, peak_MiB
from benchmarks.candidates import BUILDERS, EXPORTS, Variant, interleaved, load, ratio, summary
from benchmarks.common import Job, Promise, Verdict, machine_of, table, track
from benchmarks.runtimes import draw_images

LARGE = ("Patchcore 658", "Patchcore 3000")
"""Not measured at batch 16, which would take minutes a call."""
BATCHES = (1, 16)
KEY = ("model", "runtime", "batch", "promise")
OPTIONS = {"rounds": 30, "parts": ("tables", "promises")}
QUICK = {"parts": ["promises"]}
OPENVINO = "OpenVINO f32"
PROMISES: dict[Promise, tuple[Variant, Variant]] = {
    Promise("WTFlow / backbone, torch", most=1.15): (Variant("WTFlow"), Variant("backbone")),
    Promise("WTFlow / backbone, OpenVINO", most=1.15): (Variant("WTFlow", OPENVINO), Variant("backbone", OPENVINO)),
    Promise("Patchcore of 658 images / WTFlow, torch", least=10): (Variant("Patchcore 658"), Variant("WTFlow")),
    Promise("FastFlow / WTFlow, torch", least=1.5): (Variant("FastFlow"), Variant("WTFlow")),
}
"""About the ratio of two variants' times."""
COLUMNS = {
    "model": "{model}",
    "runtime": "{runtime}",
    "ms an image (quartiles)": "{ms_an_image:.2f} ({quartiles_ms[0]:.2f} to {quartiles_ms[1]:.2f})",
    "to the backbone": "{to_backbone:.2f}",
    "file": "{file_MiB:.1f} MiB",
    "peak memory": "{peak_MiB} MiB",
    "first result": "{first_result_seconds:.2f} s",
}


def grid() -> list[Variant]:
    """Return what is measured for the tables."""
    names = [(model, batch) for batch in BATCHES for model in BUILDERS if batch == 1 or model not in LARGE]
    variants = [Variant(model, "torch", batch) for model, batch in names]
    for runtime in ("torch.compile", *EXPORTS):
        variants += [Variant(model, runtime, batch) for model in ("backbone", "WTFlow") for batch in BATCHES]
        if runtime in ("onnxruntime", OPENVINO):
            variants += [Variant(model, runtime) for model in ("FastFlow", "Padim", "Patchcore 100", "Patchcore 658")]
    return variants


def memory(name: str, runtime: str) -> dict[str, float]:
    """Measure, in a process that has done nothing else, the memory of a model in torch."""
    with TemporaryDirectory() as folder:
        model, _ = load(name, runtime, Path(folder))
    model(draw_images(1))
    return {"peak_MiB": peak_MiB()}


def alone(name: str, runtime: str, path: Path | None) -> dict[str, Any]:
    """Measure file and peak memory in a process of its own; of an exported model without torch, and first result."""
    files = [file for file in path.parent.iterdir() if file.suffix in (".bin", ".data", path.suffix)] if path else []
    line = {"file_MiB": round(sum(file.stat().st_size for file in files) / 2**20, 2) if path else None}
    return line | (call(runtimes.first_result, str(path), runtime) if path else call(memory, name, runtime))


def measure_grid(variants: list[Variant], rounds: int) -> list[Line]:
    """Measure variants; return a JSON line for each."""
    opened: dict[tuple[str, str], tuple[Callable[[Any], Any], Path | None]] = {}
    inputs = {batch: draw_images(batch) for batch in BATCHES}
    with TemporaryDirectory() as folder:
        for variant in track(variants, "Building"):
            if variant[:2] not in opened:
                opened[variant[:2]] = load(*variant[:2], Path(folder) / str(len(opened)))
        seconds = interleaved({v: partial(opened[v[:2]][0], inputs[v.batch]) for v in variants}, rounds)
        paths = {key: path for key, (_, path) in opened.items()}
        opened.clear()
        gc.collect()
        own = {key: alone(*key, path) for key, path in track(paths.items(), "Memory")}
    lines = []
    for variant, taken in seconds.items():
        line = summary(variant, taken, variant.batch, 3)
        line["to_backbone"] = round(ratio(seconds, variant, variant._replace(model="backbone")), 3)
        lines.append({**line, **(own[variant[:2]] if variant.batch == 1 else {})})
    return lines


def measure_promises(rounds: int) -> list[Line]:
    """Measure the promises, and nothing else in between; return a JSON line for each.

    The two sides of each promise take turns by themselves: which other models run in between, and in which order,
    moved a ratio by up to 6 %.
    """
    sides = list(dict.fromkeys(side for pair in PROMISES.values() for side in pair))
    calls, lines = {}, []
    with TemporaryDirectory() as folder:
        for k, side in enumerate(track(sides, "Building")):
            model, _ = load(side.model, side.runtime, Path(folder) / str(k))
            calls[side] = partial(model, draw_images(side.batch))
        for promise, pair in PROMISES.items():
            seconds = interleaved({side: calls[side] for side in pair}, rounds)
            lines.append({"promise": promise.text, "ratio": round(ratio(seconds, *pair), 3), "rounds": rounds})
    return lines


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the parts."""
    if "tables" in given.parts:
        yield [variant._asdict() for variant in grid()], partial(measure_grid, grid(), max(2, given.rounds // 3))
    if "promises" in given.parts:
        yield [{"promise": promise.text} for promise in PROMISES], partial(measure_promises, given.rounds)


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say which promises are kept, of those that were measured."""
    ratios = {line["promise"]: line["ratio"] for line in lines if "promise" in line}
    return [promise.verdict(ratios[promise.text]) for promise in PROMISES if promise.text in ratios]


def render(lines: list[Line]) -> str:
    """Render a Markdown table a batch size, and the promises."""
    text = [machine_of(lines), ""]
    for batch in dict.fromkeys(line["batch"] for line in lines if "batch" in line):
        text += [f"**batch {batch}**", "", *table(COLUMNS, [line for line in lines if line.get("batch") == batch])]
    return "\n".join([*text, *(f"- {verdict}" for _, verdict in verdicts(lines))])
