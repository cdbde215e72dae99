"""New thresholds for a quantised graph, whose scores differ from those in f32.

They are found in the graph by placeholders, which the post-processor holds while the graph is exported.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.post_processor import WTFlowPostProcessor

PLACEHOLDERS = {"_image_threshold": 1e12, "_pixel_threshold": 2e12}
"""Far above any score: under such a threshold only an image of an unknown product is called anomalous."""
STEP = 2.0**-10
"""Placeholders of products are apart by this share, so that no two constants of the graph are alike."""


def placeholders(name: str, count: int) -> Tensor:
    """Return the placeholders of the products' thresholds, ``(count,)``."""
    return PLACEHOLDERS[name] * (1 + STEP * torch.arange(count, dtype=torch.float32))


@contextmanager
def placed(post: WTFlowPostProcessor) -> Iterator[None]:
    """Put placeholders into a post-processor while it is exported."""
    kept = {name: post.get_buffer(name).clone() for name in PLACEHOLDERS}
    try:
        for name, values in kept.items():
            post.get_buffer(name).copy_(placeholders(name, len(values)))
        yield
    finally:
        for name, values in kept.items():
            post.get_buffer(name).copy_(values)


def score_images(graph: Any, images: Iterable[NDArray], count: int) -> Scores:
    """Score images ``(1, 3, H, W)`` through an OpenVINO graph with placeholders.

    With T the placeholder and n the normalised score, the raw one is ``T n / (1 - n)``.
    """
    import openvino

    graph = graph.clone()
    # The image threshold's reader takes the row of the product that the graph recognises.
    gather = next(iter(_constant(graph, "_image_threshold", count).output(0).get_target_inputs())).get_node()
    graph.add_outputs([gather.input(1).get_source_output()])
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    rows = []
    for image in images:
        result = compiled(image)
        names = ("pred_score", "anomaly_map", "pred_label", len(compiled.outputs) - 1)
        rows.append([float(result[name].max()) for name in names])
    score, peak, unknown, index = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    raw = [
        placeholders(name, count)[index.long()] * n / (1 - n)
        for name, n in (("_image_threshold", score), ("_pixel_threshold", peak))
    ]
    return Scores(raw[0].masked_fill(unknown > 0, torch.inf).float(), raw[1].float(), index.long())


def set_thresholds(graph: Any, post: WTFlowPostProcessor, count: int) -> None:
    """Replace the placeholders in an OpenVINO graph by the thresholds of a post-processor."""
    from openvino import opset13

    for name in PLACEHOLDERS:
        old = _constant(graph, name, count)
        new = opset13.constant(post.get_buffer(name).cpu().float().numpy().reshape(old.data.shape))
        new.set_friendly_name(old.get_friendly_name())
        for reader in old.output(0).get_target_inputs():
            reader.replace_source_output(new.output(0))


def _constant(graph: Any, name: str, count: int) -> Any:
    """Find the placeholders in a graph."""
    values = placeholders(name, count).numpy()
    constants = [op for op in graph.get_ordered_ops() if op.get_type_name() == "Constant" and op.data.size == count]
    found = [constant for constant in constants if np.allclose(constant.data.ravel(), values, 1e-6, 0)]
    if len(found) != 1:
        msg = f"The exported graph holds {len(found)} constants like its thresholds, not 1: export it in FP32."
        raise WTFlowError(msg)
    return found[0]
