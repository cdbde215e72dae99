"""Exports: what WTFlow adds to anomalib's."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components.base.export_mixin.utils import create_export_root
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from anomalib_wtflow.checkpoint import broken_tensors
from anomalib_wtflow.deploy.metadata import describe, write_onnx, write_openvino
from anomalib_wtflow.deploy.quantization import count_convolutions, keep_precise, quantize
from anomalib_wtflow.deploy.thresholds import placed, score_images, set_thresholds
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.images import mark_of
from anomalib_wtflow.post_processor import WTFlowPostProcessor

RANGE_IMAGES = 128
"""Training images that set the ranges of a quantised export."""
CALIBRATED = (CompressionType.INT8, CompressionType.INT8_PTQ)
"""Compressions whose thresholds are set again; INT8_ACQ looks at labels while it quantises, under those of f32."""


class Exports:
    """Mixin that extends anomalib's exports; put it before ``ExportMixin``.

    It keeps the backbone's stem in f32 whatever precision a runtime chooses, quantises the backbone behind its stem
    only, with training images, and sets the thresholds of a quantised graph through it. The metadata say what an export
    is and promises (:mod:`anomalib_wtflow.deploy.metadata`). Each export raises a ``WTFlowError`` if a weight or
    threshold is not finite.
    """

    model: Any
    post_processor: Any
    products: Sequence[str]
    marks: Mapping[str, Tensor]

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does, without gradients: ``TorchInferencer`` runs it as it is."""
        self._raise_for_no_export()
        parent: Any = super()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            self.model.requires_grad_(False)
            return parent.to_torch(*args, **kwargs)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does, to ONNX and, on the way, to OpenVINO."""
        self._raise_for_no_export()
        # anomalib asks for 14, to which torch's exporter, which writes 18, fails to convert, with a traceback.
        parent: Any = super()
        path = parent.to_onnx(*args, **{"opset_version": 18, "verbose": False, **kwargs})
        write_onnx(path, describe(self, self.post_processor, "FP32", promised=True))
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as anomalib does; the backbone's stem stays in f32 in any precision.

        INT8 and INT8_PTQ move the scores, so their thresholds are set again through the quantised graph, with the
        images of the data module that the model's thresholds come from.

        Raises:
            WTFlowError: If the data module lacks images that the thresholds come from.
        """
        self._raise_for_no_export()
        parent: Any = super()
        post, promised = self.post_processor, compression_type in (None, CompressionType.FP16)
        if compression_type in CALIBRATED and datamodule is not None:
            path = create_export_root(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
            post, promised = self._write_quantized(path, compression_type, datamodule, input_size, **kwargs)
        else:
            path = parent.to_openvino(export_root, model_file_name, input_size, compression_type, datamodule, **kwargs)
        precision = "FP32" if compression_type is None else CompressionType(compression_type).name
        if datamodule is None and not promised:
            rank_zero_warn(f"{precision} moves the scores, and the thresholds stay as they were: give it --data.")
        write_openvino(path, describe(self, post, precision, promised))
        keep_precise(path, count_convolutions(self.model.feature_extractor))
        return path

    def _write_quantized(
        self,
        path: Path,
        compression: CompressionType,
        datamodule: AnomalibDataModule,
        input_size: tuple[int, int] | None,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> tuple[Any, bool]:
        """Write a quantised graph; return its post-processor, and whether thresholds were reset."""
        import nncf
        import openvino

        datamodule.setup("fit")
        post, marks, count = copy.deepcopy(self.post_processor), self.marks["calibration"], len(self.products)
        images = calibration_images(datamodule, marks, len(post.calibration_index)) if self._sets_thresholds else None
        with TemporaryDirectory() as folder:
            with placed(self.post_processor) if self._sets_thresholds else nullcontext():
                onnx = self.to_onnx(folder, input_size=input_size, **(onnx_kwargs or {}))
            graph = openvino.convert_model(onnx, **(ov_kwargs or {}))
            if compression == CompressionType.INT8:
                graph = nncf.compress_weights(graph)
            else:
                ranges = range_images(datamodule, marks)
                graph = quantize(graph, ranges, count_convolutions(self.model.feature_extractor))
            if images is not None:
                post.calibrate(score_images(graph, images, count), count)
                set_thresholds(graph, post, count)
            openvino.save_model(graph, path, compress_to_fp16=False)
        return post, images is not None and len(post.calibration_index.unique()) == count

    @property
    def _sets_thresholds(self) -> bool:
        """Return whether a quantised graph can get new thresholds: scores must be normalised."""
        post = self.post_processor
        if not isinstance(post, WTFlowPostProcessor) or post.false_alarm_rate is None:
            return False
        plain = post.image_sensitivity == post.pixel_sensitivity == 0.5
        return plain and post.enable_normalization and post.enable_thresholding

    def _raise_for_no_export(self) -> None:
        broken = next(broken_tensors(self.model.state_dict()), None)
        if broken is not None:
            msg = f"'{broken}' of the model is NaN or infinite: load another checkpoint, or train the model again."
            raise WTFlowError(msg)
        if isinstance(self.post_processor, WTFlowPostProcessor):
            self.post_processor.raise_for_no_threshold()


def range_images(datamodule: Any, marks: Tensor) -> list[NDArray]:
    """Return evenly spread training images ``(1, 3, H, W)`` that set no threshold."""
    data, held = datamodule.train_data, set(marks.tolist())
    kept = [index for index, path in enumerate(data.samples["image_path"]) if mark_of(path) not in held]
    chosen = torch.linspace(0, len(kept) - 1, min(len(kept), RANGE_IMAGES)).long().tolist()
    return [data[kept[each]].image[None].numpy() for each in chosen]


def calibration_images(datamodule: Any, marks: Tensor, count: int) -> Iterator[NDArray]:
    """Return the images ``(1, 3, H, W)`` that the thresholds of a model come from.

    Raises:
        WTFlowError: If the data module lacks one.
    """
    missing, found = Counter(marks.tolist()), []
    for data in (datamodule.train_data, datamodule.val_data):
        for index, mark in enumerate(map(mark_of, data.samples["image_path"])):
            if missing[mark]:
                missing[mark] -= 1
                found.append((data, index))
    if len(found) != count:
        msg = (
            f"The thresholds come from {count} images, of which this data has {len(found)}, so the rate of a quantised "
            "export is not known: give --data as in the training, with its seed, or export in FP32 or FP16."
        )
        raise WTFlowError(msg)
    return (data[index].image[None].numpy() for data, index in found)
