"""The thresholds of a quantised graph: set again through it, since it scores otherwise than the model in f32.

They are found in the graph by placeholders, which the post-processor holds while the graph is exported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anomalib_wtflow.post_processor import WTFlowPostProcessor

NAMES = ("_image_threshold", "_pixel_threshold")
PLACEHOLDER = {"_image_threshold": 1e12, "_pixel_threshold": 2e12}
"""Far above any score: under such a threshold only an image that is like no product is called anomalous."""
STEP = 2.0**-10
"""Placeholders of products are apart by this share, so that no two constants of the graph are alike."""


def placeholders(name: str, count: int) -> Tensor:
    """Return the placeholders of the products' thresholds, ``(count,)``."""
    return PLACEHOLDER[name] * (1 + STEP * torch.arange(count, dtype=torch.float32))


@contextmanager
def placed(post: WTFlowPostProcessor) -> Iterator[None]:
    """Have a post-processor hold placeholders while it is exported."""
    kept = {name: post.get_buffer(name).clone() for name in NAMES}
    try:
        for name, values in kept.items():
            post.get_buffer(name).copy_(placeholders(name, len(values)))
        yield
    finally:
        for name, values in kept.items():
            post.get_buffer(name).copy_(values)


class GraphThresholds:
    """The thresholds in an OpenVINO graph that was exported with placeholders.

    Args:
        model: OpenVINO model; its thresholds are replaced in place.
        count: Number of products.

    Raises:
        ValueError: If the graph does not hold each placeholder once.
    """

    def __init__(self, model: Any, count: int) -> None:
        self.model, self.count = model, count
        self.constants = {name: self._find(placeholders(name, count).numpy()) for name in NAMES}

    def _find(self, values: np.ndarray) -> Any:
        constants = [op for op in self.model.get_ordered_ops() if op.get_type_name() == "Constant"]
        found = [
            op for op in constants if op.data.size == len(values) and np.allclose(op.data.ravel(), values, 1e-6, 0)
        ]
        if len(found) != 1:
            msg = f"The exported graph holds {len(found)} constants like its thresholds, not 1: export it in FP32."
            raise ValueError(msg)
        return found[0]

    def set(self, name: str, values: Tensor) -> None:
        """Replace a threshold, ``(count,)``."""
        from openvino import opset13

        old = self.constants[name]
        new = opset13.constant(values.cpu().float().numpy().reshape(old.data.shape))
        new.set_friendly_name(old.get_friendly_name())
        for reader in old.output(0).get_target_inputs():
            reader.replace_source_output(new.output(0))
        self.constants[name] = new

    def scores(self, images: Iterator[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Score images ``(1, 3, H, W)`` through the graph, which still has its placeholders.

        With T the placeholder and n the normalised score, the raw one is ``T n / (1 - n)``.

        Returns:
            Raw scores (infinite if like no product), largest pixels, and the places of the products, ``(N,)`` each.
        """
        import openvino

        graph = self.model.clone()
        # The image threshold's reader takes the row of the product that the graph recognises.
        gather = next(iter(self._twin(graph, "_image_threshold").output(0).get_target_inputs())).get_node()
        graph.add_outputs([gather.input(1).get_source_output()])
        compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        rows = []
        for image in images:
            result = compiled(image)
            outputs = {output.get_any_name(): result[output] for output in compiled.outputs if output.names}
            place = int(np.ravel(result[len(compiled.outputs) - 1])[0])
            raw = [
                float(self._raw(float(np.max(outputs[field])), float(self._value(name, place))))
                for field, name in (("pred_score", "_image_threshold"), ("anomaly_map", "_pixel_threshold"))
            ]
            rows.append((torch.inf if bool(np.ravel(outputs["pred_label"])[0]) else raw[0], raw[1], place))
        scores, peaks, product = (torch.tensor(values) for values in zip(*rows, strict=True))
        return scores, peaks, product

    def _value(self, name: str, place: int) -> float:
        return self.constants[name].data.ravel()[place]

    @staticmethod
    def _raw(normalised: float, threshold: float) -> float:
        return threshold * normalised / (1 - normalised) if normalised < 1 else float("inf")

    def _twin(self, graph: Any, name: str) -> Any:
        wanted = self.constants[name].get_friendly_name()
        return next(op for op in graph.get_ordered_ops() if op.get_friendly_name() == wanted)
