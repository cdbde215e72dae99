"""Exported models in ONNX Runtime and OpenVINO, without torch."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.base import peak_MiB

SIDE = 256
Call = Callable[[np.ndarray], Any]


def draw_images(batch: int) -> np.ndarray:
    """Draw images ``(batch, 3, 256, 256)`` in [0, 1]."""
    return np.random.default_rng(0).random((batch, 3, SIDE, SIDE), np.float32)


def in_onnxruntime(path: Path) -> Call:
    """Open an ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {session.get_inputs()[0].name: batch})


def in_openvino(precision: str = "f32") -> Callable[[Path], Call]:
    """Open an OpenVINO file with a precision for what is not quantised."""

    def start(path: Path) -> Call:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        return openvino.compile_model(path, "CPU", options)

    return start


OPENERS: dict[str, Callable[[Path], Call]] = {
    "onnxruntime": in_onnxruntime,
    "OpenVINO f32": in_openvino(),
    "OpenVINO FP16": in_openvino(),
    "OpenVINO bf16": in_openvino("bf16"),
    "OpenVINO INT8": in_openvino(),
}
"""Runtimes of exported models. FP16 is the weights in the file: the CPU computes in f32."""


def first_result(path: str, runtime: str) -> dict[str, float]:
    """Measure, in a process that has done nothing else, the time from the file to the first result, and the memory."""
    start = time.perf_counter()
    call = OPENERS[runtime](Path(path))
    call(draw_images(1))
    first = time.perf_counter() - start
    call(draw_images(1))
    assert "torch" not in sys.modules
    return {"peak_MiB": peak_MiB(), "first_result_seconds": round(first, 2)}
