"""Memory and answers over many predictions in a row: torch and OpenVINO from four threads, and `anomalib predict`.

    python -m benchmarks endless [--predictions N] [--seconds N]
    python -m benchmarks endless --quick                     a tiny model, in a minute or two

One image at a time, eight images in turn, until there are as many predictions as asked for or the time is over. The
first answers to each image are what all later ones are compared with, bit by bit, whichever thread gives them. Each
runtime has a process of its own. ``predict`` is what `anomalib predict --return_predictions false` does with a folder
of as many images, without pictures; it counts the verdicts in the file each time that it looks at the memory. The slope
is that of resident memory over predictions by least squares, of the second half, once free memory is given back to the
system: in the first, buffers are made for each thread. The exit status is 1 if a promise
is missed.
"""

import ctypes
import gc
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.base import Line, call
from benchmarks.common import Job, Promise, Verdict, machine_of, table

KEY = ("runtime", "tiny")
OPTIONS = {"runtimes": ("torch", "OpenVINO f32", "predict"), "predictions": 100_000, "seconds": 300, "tiny": False}
QUICK = {"predictions": 40_000, "tiny": True}
THREADS, IMAGES, LOOKS, STREAM = 4, 8, 100, 10_000
"""Threads that predict at a time, images that take turns, how often the memory is looked at, and files of `predict`."""
TINY = {"image_size": 33, "layers": ["blocks.1"], "overrides": {"width": 8, "sigma": 0.0}}
Answer = Callable[[np.ndarray], list[np.ndarray]]
MOST_KIB = 256.0
"""Largest slope, in KiB for 1000 predictions: a map of 256 x 256 that is kept of each would be 256 000 KiB, one of the
tiny model 4 254, and an object of Python of 300 bytes 293."""
COLUMNS = {
    "runtime": "{runtime}",
    "predictions": "{predictions}",
    "memory, MiB": "{first_MiB:.1f} to {last_MiB:.1f}",
    "slope, KiB for 1000": "{slope_KiB:.1f}",
    "other answers": "{differing}",
}


def resident() -> int:
    """Return the bytes of this process that are in memory and in use, on Linux with glibc.

    What its allocator keeps of memory that is free is given back first: on a busy machine it grew by 12 MiB at a time.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ready(tiny: bool) -> Any:
    """Build a model that is fitted to noise, with thresholds; its field has random weights."""
    import torch

    from anomalib_wtflow import WTFlow

    torch.set_num_threads(1)
    model = WTFlow(visualizer=False, **(TINY if tiny else {})).eval()
    size = model.pre_processor.transform.transforms[0].size
    with torch.no_grad():
        noise = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(0))
        features = model.model.extract(model.pre_processor(noise))
        model.model.update(features, torch.zeros(4, dtype=torch.int64))
        model.model.finalize()
        model.model.observe(model.model.normalise(features).x0, size)
        model.post_processor.calibrate(torch.ones(19), torch.ones(19))
    return model


def side(tiny: bool) -> int:
    """Return the side of the images."""
    return int(TINY["image_size"]) if tiny else 256


def in_torch(model: Any, folder: Path) -> Callable[[], Answer]:
    """Prepare answers in torch; all threads share the model."""
    import torch

    del folder

    def answer(image: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [values.numpy() for values in model(torch.from_numpy(image))]

    return lambda: answer


def in_openvino(model: Any, folder: Path) -> Callable[[], Answer]:
    """Prepare answers in OpenVINO; each thread has a request of its own."""
    import openvino

    ready = openvino.compile_model(model.to_openvino(folder), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def start() -> Answer:
        request = ready.create_infer_request()
        return lambda image: [np.array(values) for values in request.infer(image).values()]

    return start


RUNTIMES = {"torch": in_torch, "OpenVINO f32": in_openvino}


def slope(looks: list[tuple[int, int]]) -> Line:
    """Return the slope of memory over predictions, from pairs of both, and where it began and ended."""
    looks = sorted(looks)[len(looks) // 2 :]
    predictions, memory = np.array(looks).T
    per_prediction = float(np.polyfit(predictions, memory, 1)[0])
    return {
        "slope_KiB": round(per_prediction * 1000 / 2**10, 2) + 0.0,  # no negative zero
        "first_MiB": round(int(memory[0]) / 2**20, 2),
        "last_MiB": round(int(memory[-1]) / 2**20, 2),
    }


def measure(runtime: str, tiny: bool, predictions: int, seconds: float) -> Line:
    """Measure a runtime in this process."""
    images = np.random.default_rng(0).random((IMAGES, 1, 3, side(tiny), side(tiny)), np.float32)
    looks, differing, numbers = [], [0] * THREADS, count()
    with TemporaryDirectory() as folder:
        start = RUNTIMES[runtime](ready(tiny), Path(folder))
        first = [start()(image) for image in images]
        begin = time.perf_counter()

        def work(thread: int) -> int:
            answer, done = start(), 0
            for number in numbers:
                if number >= predictions or time.perf_counter() - begin > seconds:
                    return done
                given = answer(images[number % IMAGES])
                differing[thread] += not all(map(np.array_equal, given, first[number % IMAGES]))
                done += 1
                if number % max(1, predictions // LOOKS) == 0:
                    looks.append((number, resident()))
            return done

        with ThreadPoolExecutor(THREADS) as pool:
            done = sum(pool.map(work, range(THREADS)))
    taken = round(time.perf_counter() - begin, 1)
    return {"predictions": done, "seconds": taken, **slope(looks), "differing": sum(differing)}


def measure_predict(tiny: bool, predictions: int) -> Line:
    """Measure `anomalib predict` in this process, of 10 000 files at most, which are links to a few images."""
    from anomalib.data import PredictDataset
    from anomalib.engine import Engine
    from lightning.pytorch import Callback
    from PIL import Image

    from anomalib_wtflow.reporting.verdicts import read

    predictions = min(predictions, STREAM)
    looks: list[tuple[int, int]] = []
    late: list[int] = []

    class Look(Callback):
        def on_predict_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            del kwargs
            index = args[3]
            if index % max(1, predictions // LOOKS) == 0:
                rows = sum(1 for _ in (Path(trainer.default_root_dir) / "scores.csv").open()) - 1
                late.append(index - max(0, rows))  # this image's row comes after this
                looks.append((index, resident()))

    with TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side(tiny), side(tiny), 3), np.uint8)
        for number in range(predictions):
            path, kind = folder / f"{number:06d}.png", folder / f"{number % IMAGES:06d}.png"
            if number < IMAGES:
                Image.fromarray(pixels[number]).save(path)
            else:
                path.hardlink_to(kind)
        engine = Engine(default_root_dir=name, logger=False, enable_progress_bar=False, callbacks=[Look()])
        begin = time.perf_counter()
        given = engine.predict(ready(tiny), dataset=PredictDataset(folder), return_predictions=False)
        taken = round(time.perf_counter() - begin, 1)
        assert given is None
        rows = list(read(Path(engine.trainer.default_root_dir) / "scores.csv"))
    first = [{**row, "image_path": None} for row in rows[:IMAGES]]
    differing = sum({**row, "image_path": None} != first[number % IMAGES] for number, row in enumerate(rows))
    own = {"differing": differing, "late_rows": max(late)}
    return {"predictions": len(rows), "seconds": taken, **slope(looks), **own}


def render(lines: list[Line]) -> str:
    """Return the table."""
    lines = [line for line in lines if not line["tiny"]] or lines
    return "\n".join([*table(COLUMNS, lines), f"{THREADS} threads, but for predict; {machine_of(lines)} each."])


def verdicts(lines: list[Line]) -> list[Verdict]:
    """Say which promises are kept."""
    result = []
    for line in lines:
        promise = Promise(f"{line['runtime']}, KiB of memory for 1000 predictions", most=MOST_KIB, digits=".1f")
        wrong = line["differing"] + line.get("late_rows", 0)
        text = f"{line['runtime']}, answers other than the first to the same image, or late: {wrong} (none)"
        result += [promise.verdict(line["slope_KiB"]), (wrong == 0, f"{text} {'MISSED' if wrong else 'kept'}")]
    return result


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan a process for each runtime."""
    for runtime in given.runtimes:
        job = (
            partial(call, measure_predict, given.tiny, given.predictions)
            if runtime == "predict"
            else partial(call, measure, runtime, given.tiny, given.predictions, given.seconds)
        )
        yield {"runtime": runtime, "tiny": given.tiny}, job
