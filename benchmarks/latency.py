"""Latency of WTFlow from image to score and map, beside its backbone alone, FastFlow, Padim and Patchcore.

Usage:
    python benchmarks/latency.py              the tables and the promises, what is missing of them; JSON
    python benchmarks/latency.py --quick      the ratios that are promised, in under three minutes; 1 if one is missed
    python benchmarks/latency.py --profile    where the time goes in OpenVINO f32: the backbone, and what comes after it
    python benchmarks/latency.py --render     the tables of the README, from the JSON

256 x 256 images in memory. The variants take turns in one process, so that what else runs on the machine hits all
alike; a ratio is the median over the rounds of the ratios within a round. Memory comes from a process of its own for
each model and runtime: where the model is exported, without torch, and with the time from the start of the import of
the runtime to the first result. anomalib's models are exported for one image, WTFlow and its backbone with a free
batch size. Models are not trained, which changes no time: a Patchcore bank of n images has the size that anomalib's
default coreset, 10 %, gives it. ``backbone`` is WTFlow's own, folded and cut behind its last layer; ``backbone
(timm)`` is the same as timm builds it, which the other models run.
"""

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accuracy import machine
from anomalib.models import Padim, Patchcore
from anomalib.post_processing import PostProcessor
from lines import append, need, read
from rich.progress import track
from rows import IMAGE_SIZE, LiteFastflow, neighbours, packaged_network
from runtimes import OPENERS, THROUGHPUT_IMAGES, draw_images, peak_MiB
from torch import Tensor, nn

from anomalib_wtflow import WTFlow
from anomalib_wtflow.deploy.quantization import count_convolutions, keep_precise, quantize, tail_names
from anomalib_wtflow.features.backbone import FeatureExtractor

RESULTS = Path(__file__).parent / "results" / "latency.json"
POSITIONS = (IMAGE_SIZE // 8) ** 2
BANKS = (100, 300, 658, 3000)
LARGE = ("Patchcore 658", "Patchcore 3000", "WTFlow 3000")
"""Not measured at batch 16, which would take minutes a call; the size of the training set is compared at batch 1."""
PAUSE = 0.05
"""Seconds between two turns."""
REPEATS, ENOUGH = 5, 0.1
"""Timed calls of a turn, and the seconds after which no further one begins."""
CHANNELS = 152
"""Of strides 8 and 16, which anomalib's models use."""


@dataclass(frozen=True)
class Variant:
    """A model in a runtime at a batch size."""

    model: str
    runtime: str
    batch: int

    def __str__(self) -> str:
        """Name it as the tables do."""
        return f"{self.model}, {self.runtime}, batch {self.batch}"


class Promise:
    """A ratio of two variants, and the limit that it must keep.

    Args:
        text: What is promised.
        above: Variant in the numerator.
        below: Variant in the denominator.
        least: Smallest ratio, or None.
        most: Largest ratio, or None.
    """

    def __init__(
        self, text: str, above: Variant, below: Variant, least: float | None = None, most: float | None = None
    ) -> None:
        self.text, self.above, self.below, self.least, self.most = text, above, below, least, most

    def verdict(self, ratio: float) -> tuple[bool, str]:
        """Whether a ratio keeps the promise, and the line that says so."""
        kept = (self.least is None or ratio >= self.least) and (self.most is None or ratio <= self.most)
        limits = [f"at least {self.least:g}" if self.least else "", f"at most {self.most:g}" if self.most else ""]
        limit = " and ".join(text for text in limits if text)
        return kept, f"{self.text}: {ratio:.3f} ({limit}) {'kept' if kept else 'MISSED'}"


def one(model: str, runtime: str = "torch") -> Variant:
    """Return a variant at batch size 1."""
    return Variant(model, runtime, 1)


PROMISES = (
    Promise("WTFlow of 3000 images / of 100, torch", one("WTFlow 3000"), one("WTFlow"), least=0.97, most=1.03),
    Promise("WTFlow / backbone, torch", one("WTFlow"), one("backbone"), most=1.15),
    Promise("WTFlow / backbone, OpenVINO", one("WTFlow", "OpenVINO f32"), one("backbone", "OpenVINO f32"), most=1.15),
    Promise("Patchcore of 658 images / WTFlow, torch", one("Patchcore 658"), one("WTFlow"), least=10),
    Promise("FastFlow / WTFlow, torch", one("FastFlow"), one("WTFlow"), least=1.5),
)  # fmt: skip


# Models --------------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """WTFlow's backbone as WTFlow runs it, a few images at a time, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = FeatureExtractor()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps."""
        return self.feature_extractor._maps(images.contiguous(memory_format=torch.channels_last))


def wtflow(images: int) -> WTFlow:
    """WTFlow with statistics of as many images, which are the same 8 of noise again and again."""
    model = WTFlow().eval()
    torch_model: Any = model.model
    features = torch_model.extract(torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE))
    for _ in range(images // 8):
        torch_model.normalization.update(features)
    torch_model.normalization.finalize()
    torch_model.observe(features, (IMAGE_SIZE, IMAGE_SIZE))
    model.post_processor._image_threshold.fill_(0.5)
    model.post_processor._pixel_threshold.fill_(0.5)
    return model


def with_limits(model: Any) -> Any:
    """Give anomalib's post-processor thresholds and a range, so that it does all its work."""
    for name, buffer in model.post_processor.named_buffers():
        buffer.fill_(0.0 if name.endswith("min") else 1.0 if name.endswith("max") else 0.5)
    return model.eval()


def baseline(build: Callable[..., Any], **kwargs: Any) -> Any:
    """Build one of anomalib's models with anomalib's own processing."""
    processing = {
        "pre_processor": WTFlow.configure_pre_processor(IMAGE_SIZE),
        "post_processor": PostProcessor(),
        "evaluator": False,
        "visualizer": False,
    }
    return with_limits(build(**kwargs, **processing))


def patchcore(images: int) -> Any:
    """Patchcore with a bank of random rows, as many as 10 % of the images' patches."""
    model = baseline(lambda **kwargs: neighbours(Patchcore, **kwargs))
    model.model.memory_bank = torch.randn(images * POSITIONS // 10, CHANNELS)
    return model


def padim() -> Any:
    """Padim with random statistics."""
    model = baseline(lambda **kwargs: neighbours(Padim, **kwargs), n_features=100)
    model.model.gaussian.mean = torch.randn(100, POSITIONS)
    model.model.gaussian.inv_covariance = torch.eye(100).repeat(POSITIONS, 1, 1)
    return model


BUILDERS: dict[str, Callable[[], Any]] = {
    "backbone": lambda: Backbone().eval(),
    "backbone (timm)": lambda: packaged_network().eval(),
    "WTFlow": lambda: wtflow(100),
    "WTFlow 3000": lambda: wtflow(3000),
    "FastFlow": lambda: baseline(LiteFastflow),
    "Padim": padim,
    **{f"Patchcore {images}": (lambda images=images: patchcore(images)) for images in BANKS},
}


# Runtimes ------------------------------------------------------------------------------------------------------------


def to_onnx(model: Any, folder: Path) -> Path:
    """Export with a free batch size; anomalib's own models for one image, since their free size is not always free."""
    if not isinstance(model, Backbone):
        shapes: dict[str, Any] = {} if isinstance(model, WTFlow) else {"dynamic_shapes": None}
        return model.to_onnx(folder, input_size=(IMAGE_SIZE, IMAGE_SIZE), **shapes)
    path = folder / "model.onnx"
    example, free = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE), ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=free, input_names=["input"], verbose=False)
    return path


def to_openvino(precision: str) -> Callable[[Any, Path], Path]:
    """Export to OpenVINO with weights of a precision."""

    def export(model: Any, folder: Path) -> Path:
        import openvino

        network = openvino.convert_model(to_onnx(model, folder))
        extractor = (model if isinstance(model, Backbone) else model.model).feature_extractor
        ours = isinstance(extractor, FeatureExtractor)
        if precision == "INT8":
            noise = [np.random.default_rng(k).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32) for k in range(8)]
            network = quantize(network, noise, count_convolutions(extractor.network))
        path = folder / "openvino" / "model.xml"
        openvino.save_model(network, path, compress_to_fp16=precision == "FP16")
        if ours:
            keep_precise(path, count_convolutions(extractor.network))
        return path

    return export


def compiled(model: Any) -> Any:
    """Have a model run under torch.compile."""
    model.forward = torch.compile(model.forward, dynamic=False)
    return model


TORCH: dict[str, Callable[[Any], Any]] = {"torch": lambda model: model, "torch.compile": compiled}
EXPORTS: dict[str, Callable[[Any, Path], Path]] = {
    "onnxruntime": to_onnx,
    **{name: to_openvino(name.split()[1].strip(",")) for name in OPENERS if name.startswith("OpenVINO")},
}


def in_torch(network: Any) -> Callable[[np.ndarray], Any]:
    """Return a call of a module."""

    def call(batch: np.ndarray) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(batch))

    return call


def load(name: str, runtime: str, folder: Path) -> tuple[Callable[[np.ndarray], Any], Path | None]:
    """Open a model in a runtime; return the call, and the exported file if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = None
    model = BUILDERS[name]()
    if runtime in TORCH:
        call = in_torch(TORCH[runtime](model))
    else:
        path = EXPORTS[runtime](model, folder)
        call = OPENERS[runtime](path)
    call(draw_images(1))
    return call, path


def file_size(path: Path | None) -> float | None:
    """MiB of an exported model, its weights' file included."""
    if path is None:
        return None
    files = [file for file in path.parent.iterdir() if file.suffix in (".bin", ".data", path.suffix)]
    return round(sum(file.stat().st_size for file in files) / 2**20, 2)


# Measuring -----------------------------------------------------------------------------------------------------------


def interleaved(
    calls: dict[Variant, Callable[[], Any]], rounds: int, prepare: Callable[[Variant], Any] = lambda _: None
) -> dict[Variant, list[float]]:
    """Seconds of each call in each round, after a round that is not counted.

    The calls take turns, forwards and backwards, so that a drift of the machine falls on both sides of a ratio. Each
    comes after a pause in which the threads of the runtime before it stop spinning, and several times: the first, not
    timed, brings its weights back into the processor's caches. A machine that runs one model has neither another's
    threads nor another's weights. What counts is the median of the others. ``prepare`` comes before a variant's turn.
    """
    seconds: dict[Variant, list[float]] = {variant: [] for variant in calls}
    for turn in track(range(rounds + 1), description="Measuring", transient=True):
        order = list(calls.items())
        for variant, call in order if turn % 2 else order[::-1]:
            time.sleep(PAUSE)
            prepare(variant)
            call()
            taken: list[float] = []
            while len(taken) < REPEATS and sum(taken) < ENOUGH:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            if turn:
                seconds[variant].append(statistics.median(taken))
    return seconds


def ratio(seconds: dict[Variant, list[float]], above: Variant, below: Variant) -> float:
    """Median over the rounds of the ratio of two variants."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def grid() -> list[Variant]:
    """Return what is measured for the tables."""
    variants = [
        Variant(model, "torch", batch)
        for batch in (1, 16)
        for model in BUILDERS
        if not (batch == 16 and model in LARGE)
    ]
    for runtime in ("torch.compile", *EXPORTS):
        batches = (1,) if "throughput" in runtime else (1, 16)
        variants += [Variant(model, runtime, batch) for model in ("backbone", "WTFlow") for batch in batches]
        if runtime in ("onnxruntime", "OpenVINO f32"):
            variants += [Variant(m, runtime, 1) for m in ("FastFlow", "Padim", "Patchcore 100", "Patchcore 658")]
    return variants


def alone(name: str, runtime: str, path: Path | None) -> dict[str, float]:
    """Peak memory in a process of its own; of an exported model without torch, and with the time to its first result.

    A process that fails is told of, and leaves its columns empty: what was timed is not lost.
    """
    here = Path(__file__)
    if path is None:
        command = [sys.executable, str(here), "--child", name, runtime]
    else:
        command = [sys.executable, str(here.with_name("runtimes.py")), str(path), runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}, {runtime}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, runtime: str) -> None:
    """Be that process, for torch: print the JSON."""
    with TemporaryDirectory() as folder:
        call, _ = load(name, runtime, Path(folder))
    call(draw_images(1))
    print(json.dumps({"peak_MiB": peak_MiB()}))


def measure(variants: list[Variant], rounds: int) -> list[dict[str, Any]]:
    """Measure variants; return a JSON line for each."""
    models: dict[tuple[str, str], tuple[Callable[[np.ndarray], Any], Path | None]] = {}
    sizes: dict[tuple[str, str], float | None] = {}
    own: dict[tuple[str, str], dict[str, float]] = {}
    inputs = {batch: draw_images(batch) for batch in {variant.batch for variant in variants}}
    with TemporaryDirectory() as folder:
        for variant in track(variants, description="Building", transient=True):
            key = (variant.model, variant.runtime)
            if key not in models:
                models[key] = load(*key, Path(folder) / str(len(models)))
                sizes[key] = file_size(models[key][1])
        calls = {v: partial(models[v.model, v.runtime][0], inputs[v.batch]) for v in variants}
        seconds = interleaved(calls, rounds)
        paths = {key: path for key, (_, path) in models.items() if "throughput" not in key[1]}
        calls.clear()
        models.clear()
        gc.collect()
        for key, path in track(paths.items(), description="Memory", transient=True):
            own[key] = alone(*key, path)
    lines = []
    for variant in variants:
        count = THROUGHPUT_IMAGES if "throughput" in variant.runtime else variant.batch
        low, middle, high = np.percentile(seconds[variant], [25, 50, 75]) * 1000 / count
        line = {"model": variant.model, "runtime": variant.runtime, "batch": variant.batch}
        line |= {"ms_an_image": round(middle, 3), "quartiles_ms": [round(low, 3), round(high, 3)], "rounds": rounds}
        reference = Variant("backbone", variant.runtime, variant.batch)
        if reference in seconds:
            line["to_backbone"] = round(ratio(seconds, variant, reference), 3)
        if variant.batch == 1:
            key = (variant.model, variant.runtime)
            line |= {"file_MiB": sizes[key], **own.get(key, {})}
        lines.append({**line, "machine": machine()})
    return lines


def measure_promises(rounds: int) -> list[dict[str, Any]]:
    """Measure the promises, and nothing else in between; return a JSON line for each.

    The two sides of each promise take turns by themselves: which other models run in between, and in which order,
    moved a ratio by up to 6 %. So did where in memory equal modules lie; WTFlow of 100 and of 3000 images is
    therefore one module, which gets the one's and the other's state before its turn.
    """
    sides = list(dict.fromkeys(side for promise in PROMISES for side in (promise.above, promise.below)))
    module = BUILDERS["WTFlow"]()
    states = {one(name): BUILDERS[name]().state_dict() for name in ("WTFlow", "WTFlow 3000")}
    ratios: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        calls = {
            side: partial(
                in_torch(module) if side in states else load(side.model, side.runtime, Path(folder) / str(k))[0],
                draw_images(side.batch),
            )
            for k, side in enumerate(track(sides, description="Building", transient=True))
        }
        for promise in PROMISES:
            pair = {side: calls[side] for side in (promise.above, promise.below)}
            seconds = interleaved(pair, rounds, lambda side: side in states and module.load_state_dict(states[side]))
            ratios[promise.text] = ratio(seconds, promise.above, promise.below)
    return [
        {"promise": text, "ratio": round(r, 3), "rounds": rounds, "machine": machine()} for text, r in ratios.items()
    ]


def verdicts(lines: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """Whether each promise is kept, and the line that says so."""
    ratios = {line["promise"]: line["ratio"] for line in lines if "promise" in line}
    return [promise.verdict(ratios[promise.text]) for promise in PROMISES]


def profile(rounds: int) -> str:
    """Render the milliseconds of WTFlow's operations in OpenVINO f32: all of the backbone's, and the tail's by kind."""
    import openvino

    with TemporaryDirectory() as folder:
        model = BUILDERS["WTFlow"]()
        graph = openvino.convert_model(to_onnx(model, Path(folder)))
    tail = set(tail_names(graph, count_convolutions(model.model.feature_extractor.network)))
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = openvino.compile_model(graph, "CPU", options).create_infer_request()
    image = draw_images(1)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 5):
        request.infer({0: image})
        for operation in request.profiling_info if turn >= 5 else ():
            seconds = times.setdefault((operation.node_type, operation.node_name), [])
            seconds.append(operation.real_time.total_seconds() * 1000)
    totals: dict[str, float] = {}
    for (kind, name), values in times.items():
        # OpenVINO names what it has changed after the operation that was there, with a suffix.
        part = f"tail: {kind}" if name in tail or name.split("/")[0] in tail else "backbone and what OpenVINO added"
        totals[part] = totals.get(part, 0) + statistics.median(values)
    rows = [
        f"| {part} | {value:.3f} |" for part, value in sorted(totals.items(), key=lambda t: -t[1]) if value >= 0.005
    ]
    return "\n".join(["| operations | ms |", "|---|---|", *rows])


def tables(lines: list[dict[str, Any]]) -> str:
    """Render a Markdown table a batch size, and the promises."""
    text = [f"{lines[0]['machine']['cpu']}, {lines[0]['machine']['threads']} threads", ""]
    for batch in (1, 16):
        text += [
            f"**batch {batch}**",
            "",
            "| model | runtime | ms an image (quartiles) | to the backbone | file | peak memory | first result |",
            "|---" * 7 + "|",
        ]
        for line in lines:
            if line.get("batch") == batch:
                low, high = line["quartiles_ms"]
                file = "" if line.get("file_MiB") is None else f"{line['file_MiB']:.1f} MiB"
                share = f"{line['to_backbone']:.2f}" if "to_backbone" in line else ""
                memory = f"{line['peak_MiB']} MiB" if "peak_MiB" in line else ""
                memory += f" | {line['first_result_seconds']:.2f} s" if "first_result_seconds" in line else " | "
                text.append(
                    f"| {line['model']} | {line['runtime']} | {line['ms_an_image']:.2f} ({low:.2f} to {high:.2f}) | "
                    f"{share} | {file} | {memory} |"
                )
        text.append("")
    return "\n".join([*text, *(f"- {verdict}" for _, verdict in verdicts(lines))])


def main() -> int:
    """Measure and render; the exit status says whether a promise was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument(
        "--rounds", type=int, default=30, help="of the promises and the profile; a third for the tables"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if given.render:
        print(tables(need(given.output, "latency.py")))
        return 0
    if given.profile:
        print(profile(given.rounds))
        return 0
    if given.child:
        child(*given.child)
        return 0
    if given.quick:
        lines = measure_promises(given.rounds)
        print("\n".join(text for _, text in verdicts(lines)))
    else:
        done = read(given.output)
        if not any("batch" in line for line in done):
            for line in measure(grid(), max(1, given.rounds // 3)):
                append(given.output, line)
        if not any("promise" in line for line in done):
            for line in measure_promises(given.rounds):
                append(given.output, line)
        lines = read(given.output)
        print(tables(lines))
    return int(not all(kept for kept, _ in verdicts(lines)))


if __name__ == "__main__":
    sys.exit(main())
