"""Latency of WTFlow from image to score and map, beside its backbone alone, FastFlow, Padim and Patchcore.

Usage:
    python benchmarks/latency.py              all models, runtimes and batch sizes; JSON
    python benchmarks/latency.py --quick      the ratios that are promised, in under three minutes; 1 if one is missed
    python benchmarks/latency.py --profile    where the time goes in OpenVINO f32: the backbone, and what comes after it
    python benchmarks/latency.py --render     the tables of the README, from the JSON

256 x 256 images in memory. The variants take turns in one process, so that what else runs on the machine hits all
alike; a ratio is the median over the rounds of the ratios within a round. Memory and the time to the first result come
from a process of their own for each variant. Models are not trained, which changes no time: a Patchcore bank of n
images has the size that anomalib's default coreset, 10 %, gives it. ``backbone`` is WTFlow's own, folded and cut
behind its last layer; ``backbone (timm)`` is the same as timm builds it, which the other models run.
"""

import argparse
import gc
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accuracy import machine
from anomalib.models import Padim, Patchcore
from anomalib.post_processing import PostProcessor
from lines import append, read
from rich.progress import track
from rows import IMAGE_SIZE, LiteFastflow, neighbours, packaged_network
from torch import Tensor, nn

from anomalib_wtflow import WTFlow
from anomalib_wtflow.feature_extractor import FeatureExtractor
from anomalib_wtflow.quantization import quantize, tail_names

RESULTS = Path(__file__).parent / "results" / "latency.json"
POSITIONS = (IMAGE_SIZE // 8) ** 2
BANKS = (100, 300, 658, 3000)
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
    Promise("WTFlow / backbone, torch", one("WTFlow"), one("backbone"), most=1.15),
    Promise("WTFlow / backbone, OpenVINO", one("WTFlow", "OpenVINO f32"), one("backbone", "OpenVINO f32"), most=1.15),
    Promise("Patchcore of 658 images / WTFlow, torch", one("Patchcore 658"), one("WTFlow"), least=10),
    Promise("FastFlow / WTFlow, torch", one("FastFlow"), one("WTFlow"), least=1.5),
    Promise("WTFlow of 3000 images / of 100, torch", one("WTFlow 3000"), one("WTFlow"), least=0.97, most=1.03),
)  # fmt: skip


# Models --------------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """WTFlow's backbone and nothing else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps."""
        return self.network(images.contiguous(memory_format=torch.channels_last))


def wtflow(images: int) -> WTFlow:
    """WTFlow with statistics of as many noise images, at most 8 of which are drawn."""
    model = WTFlow().eval()
    torch_model: Any = model.model
    features = torch_model.extract(torch.randn(min(images, 8), 3, IMAGE_SIZE, IMAGE_SIZE))
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
    "backbone": lambda: Backbone(FeatureExtractor().network).eval(),
    "backbone (timm)": lambda: packaged_network().eval(),
    "WTFlow": lambda: wtflow(100),
    "WTFlow 3000": lambda: wtflow(3000),
    "FastFlow": lambda: baseline(LiteFastflow),
    "Padim": padim,
    **{f"Patchcore {images}": (lambda images=images: patchcore(images)) for images in BANKS},
}


# Runtimes ------------------------------------------------------------------------------------------------------------


def to_onnx(model: Any, folder: Path) -> Path:
    """Export with a free batch size, as anomalib does."""
    if hasattr(model, "to_onnx") and not isinstance(model, Backbone):
        return model.to_onnx(folder, input_size=(IMAGE_SIZE, IMAGE_SIZE))
    path = folder / "model.onnx"
    images = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=shapes, input_names=["input"], verbose=False)
    return path


def in_torch(model: Any, folder: Path, batch: int) -> tuple[Callable, Path | None]:
    """Run eagerly."""
    del folder, batch
    return lambda images: model(torch.from_numpy(images)), None


def compiled(model: Any, folder: Path, batch: int) -> tuple[Callable, Path | None]:
    """Run under torch.compile."""
    del folder, batch
    model.forward = torch.compile(model.forward, dynamic=False)
    return lambda images: model(torch.from_numpy(images)), None


def in_onnxruntime(model: Any, folder: Path, batch: int) -> tuple[Callable, Path | None]:
    """Run in ONNX Runtime."""
    import onnxruntime

    del batch
    path = to_onnx(model, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images}), path


def in_openvino(precision: str, hint: str) -> Callable[[Any, Path, int], tuple[Callable, Path | None]]:
    """Run in OpenVINO, in a precision and with a performance hint."""

    def load(model: Any, folder: Path, batch: int) -> tuple[Callable, Path | None]:
        import openvino

        del batch
        network = openvino.convert_model(to_onnx(model, folder))
        if precision == "INT8":
            extractor = model if isinstance(model, Backbone) else model.model.feature_extractor
            convolutions = sum(isinstance(module, nn.Conv2d) for module in extractor.network.modules())
            noise = [np.random.default_rng(k).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32) for k in range(8)]
            network = quantize(network, noise, convolutions)
        path = folder / "model.xml"
        openvino.save_model(network, path, compress_to_fp16=precision == "FP16")
        kind = "bf16" if precision == "bf16" else "f32"
        options = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": hint}
        ready = openvino.compile_model(path, "CPU", options)
        if hint == "LATENCY":
            return ready, path
        queue = openvino.AsyncInferQueue(ready)

        def many(images: np.ndarray) -> None:
            for _ in range(THROUGHPUT_CALLS):
                queue.start_async(images)
            queue.wait_all()

        return many, path

    return load


THROUGHPUT_CALLS = 16
RUNTIMES: dict[str, Callable[[Any, Path, int], tuple[Callable, Path | None]]] = {
    "torch": in_torch,
    "torch.compile": compiled,
    "onnxruntime": in_onnxruntime,
    **{f"OpenVINO {precision}": in_openvino(precision, "LATENCY") for precision in ("f32", "FP16", "bf16", "INT8")},
    "OpenVINO f32, throughput": in_openvino("f32", "THROUGHPUT"),
}


def load(variant: Variant, folder: Path) -> tuple[Callable[[], Any], float | None]:
    """Build a variant, run it once, and return the call that is timed and the MiB of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    model = BUILDERS[variant.model]()
    images = np.random.default_rng(0).random((variant.batch, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    with torch.no_grad():
        call, path = RUNTIMES[variant.runtime](model, folder, variant.batch)
        call(images)
    size = None
    if path is not None:
        files = [file for file in path.parent.iterdir() if file.suffix in (".bin", ".data", path.suffix)]
        size = round(sum(file.stat().st_size for file in files) / 2**20, 2)

    def timed() -> Any:
        with torch.inference_mode():
            return call(images)

    return timed, size


# Measuring -----------------------------------------------------------------------------------------------------------


def interleaved(calls: dict[Variant, Callable[[], Any]], rounds: int) -> dict[Variant, list[float]]:
    """Seconds of each call in each round, after a round that is not counted.

    The calls take turns, each twice: the first, not timed, brings its weights back into the processor's caches, which
    another model's turn has emptied and a machine that runs one model would not have.
    """
    seconds: dict[Variant, list[float]] = {variant: [] for variant in calls}
    for turn in track(range(rounds + 1), description="Measuring", transient=True):
        for variant, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            if turn:
                seconds[variant].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[Variant, list[float]], above: Variant, below: Variant) -> float:
    """Median over the rounds of the ratio of two variants."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def grid(quick: bool) -> list[Variant]:
    """Return what is measured."""
    if quick:
        return list(dict.fromkeys(side for promise in PROMISES for side in (promise.above, promise.below)))
    variants = [
        Variant(model, "torch", batch)
        for batch in (1, 16)
        for model in BUILDERS
        if not (batch == 16 and model in ("Patchcore 3000", "WTFlow 3000"))  # a matrix of 20 GB
    ]
    for runtime in RUNTIMES:
        if runtime == "torch":
            continue
        models = ["backbone", "WTFlow"]
        if runtime in ("onnxruntime", "OpenVINO f32"):
            models += ["FastFlow", "Padim", "Patchcore 100", "Patchcore 658"]
        variants += [Variant(model, runtime, batch) for model in models for batch in (1, 16)]
    return variants


def child(variant: Variant) -> dict[str, float]:
    """Memory and time to the first result of a variant, in a process of its own."""
    command = [sys.executable, __file__, "--child", variant.model, variant.runtime, str(variant.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(variant: Variant) -> None:
    """Be that process: print the JSON."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        call, _ = load(variant, Path(folder))
        first = time.perf_counter() - start
        call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_MiB": round(peak), "first_result_seconds": round(first, 2)}))


def measure(variants: list[Variant], rounds: int, processes: bool) -> tuple[list[dict[str, Any]], list[str], bool]:
    """Measure variants; return JSON lines, the promises' lines, and whether all were kept."""
    with TemporaryDirectory() as folder:
        calls, sizes = {}, {}
        for index, variant in enumerate(track(variants, description="Building", transient=True)):
            calls[variant], sizes[variant] = load(variant, Path(folder) / str(index))
        seconds = interleaved(calls, rounds)
        calls.clear()
        gc.collect()
    lines = []
    for variant in track(variants, description="Memory", transient=True, disable=not processes):
        images = variant.batch * (THROUGHPUT_CALLS if "throughput" in variant.runtime else 1)
        low, middle, high = np.percentile(seconds[variant], [25, 50, 75]) * 1000 / images
        line = {"model": variant.model, "runtime": variant.runtime, "batch": variant.batch}
        line |= {"ms_an_image": round(middle, 3), "quartiles_ms": [round(low, 3), round(high, 3)], "rounds": rounds}
        reference = Variant("backbone", variant.runtime, variant.batch)
        if reference in seconds:
            line["to_backbone"] = round(ratio(seconds, variant, reference), 3)
        line |= {"file_MiB": sizes[variant], **(child(variant) if processes else {}), "machine": machine()}
        lines.append(line)
    verdicts = [promise.verdict(ratio(seconds, promise.above, promise.below)) for promise in PROMISES]
    return lines, [text for _, text in verdicts], all(kept for kept, _ in verdicts)


def profile(rounds: int) -> str:
    """Render the milliseconds of WTFlow's operations in OpenVINO f32: all of the backbone's, and the tail's by kind."""
    import openvino

    with TemporaryDirectory() as folder:
        model = BUILDERS["WTFlow"]()
        graph = openvino.convert_model(to_onnx(model, Path(folder)))
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.model.feature_extractor.network.modules())
    tail = set(tail_names(graph, convolutions))
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = openvino.compile_model(graph, "CPU", options).create_infer_request()
    images = np.random.default_rng(0).random((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 5):
        request.infer({0: images})
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
    """Render a Markdown table a batch size."""
    text = [f"{lines[0]['machine']['cpu']}, {lines[0]['machine']['threads']} threads", ""] if lines else []
    for batch in (1, 16):
        text += [
            f"**batch {batch}**",
            "",
            "| model | runtime | ms an image (quartiles) | to the backbone | file | peak memory | first result |",
            "|---" * 7 + "|",
        ]
        for line in lines:
            if line["batch"] == batch:
                low, high = line["quartiles_ms"]
                file = "" if line["file_MiB"] is None else f"{line['file_MiB']:.1f} MiB"
                share = f"{line['to_backbone']:.2f}" if "to_backbone" in line else ""
                memory = (
                    f"{line['peak_MiB']} MiB | {line['first_result_seconds']:.1f} s" if "peak_MiB" in line else " | "
                )
                text.append(
                    f"| {line['model']} | {line['runtime']} | {line['ms_an_image']:.2f} ({low:.2f} to {high:.2f}) | "
                    f"{share} | {file} | {memory} |"
                )
        text.append("")
    return "\n".join(text)


def main() -> int:
    """Measure and render; the exit status says whether a promise was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if given.render:
        print(tables(read(given.output)))
        return 0
    if given.profile:
        print(profile(given.rounds))
        return 0
    if given.child:
        model, runtime, batch = given.child
        alone(Variant(model, runtime, int(batch)))
        return 0
    lines, verdicts, kept = measure(grid(given.quick), given.rounds, processes=not given.quick)
    if not given.quick:
        given.output.unlink(missing_ok=True)
        for line in lines:
            append(given.output, line)
        print(tables(lines))
    print("\n".join(verdicts))
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
