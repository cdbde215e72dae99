"""Exports: what anomalib's leave to a model."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from anomalib_wtflow.deploy.metadata import describe, write_onnx, write_openvino
from anomalib_wtflow.deploy.quantization import count_convolutions, fitting, keep_precise, quantize
from anomalib_wtflow.deploy.thresholds import NAMES, GraphThresholds, placed
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.solver import not_exportable
from anomalib_wtflow.post_processor import WTFlowPostProcessor
from anomalib_wtflow.settings import Settings
from anomalib_wtflow.torch_model import broken_tensors

OPSET = 18
RANGE_IMAGES = 128
"""Training images that set the ranges of a quantised export."""
CALIBRATED = (CompressionType.INT8, CompressionType.INT8_PTQ)
"""Compressions whose thresholds are set again; INT8_ACQ looks at labels while it quantises, under those of f32."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter need a gradient for a while."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class Exports:
    """Mixin before anomalib's ``ExportMixin``, whose methods are the only way into its exports.

    It refuses adaptive solvers, keeps the backbone's stem in f32 whatever precision a runtime chooses, quantises the
    backbone behind its stem only, with training images, and sets the thresholds of a quantised graph through it. What
    an export is and promises, it says in its metadata (:mod:`anomalib_wtflow.deploy.metadata`).
    """

    model: Any
    settings: Settings
    post_processor: Any
    products: Sequence[str]
    _thresholds_of: tuple[Any, ...] = ()
    """Post-processor with the thresholds of the graph that is being written; in a tuple, not a part of the model."""

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does, with weights that need no gradient: ``TorchInferencer`` runs them as they are.

        Raises:
            ValueError: If the solver is adaptive, and so does not export, or a weight or threshold is not finite.
            RuntimeError: If the root folder takes no file of that size.
        """
        self._check_exportable()
        parent: Any = super()
        with frozen(self):  # type: ignore[arg-type]
            return parent.to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Export as anomalib does, to ONNX and, on the way, to OpenVINO.

        Raises:
            ValueError: If the solver is adaptive, and so does not export, or a weight or threshold is not finite.
            RuntimeError: If the root folder takes no file of that size.
        """
        self._check_exportable()
        # anomalib asks for 14, to which torch's exporter, which writes 18, fails to convert, with a traceback.
        parent: Any = super()
        path = parent.to_onnx(*args, **{"opset_version": OPSET, "verbose": False, **kwargs})
        write_onnx(path, describe(self, self.post_processor, "FP32", promised=True))
        return path

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does; whatever precision the runtime chooses, the backbone's stem stays in f32.

        INT8 and INT8_PTQ move the scores, so their thresholds are set again through the quantised graph, with the
        calibration images of the data module.

        Raises:
            ValueError: If the solver is adaptive, and so does not export, a weight or threshold is not finite, INT8_PTQ
                is given no data module, or images that a fixed ``input_size`` does not fit.
            RuntimeError: If the root folder takes no file of that size.
        """
        parent: Any = super()
        given = signature(parent.to_openvino).bind(*args, **kwargs).arguments
        compression, data = given.get("compression_type"), given.get("datamodule")
        self._thresholds_of = (copy.deepcopy(self.post_processor),)
        try:
            with placed(self.post_processor) if self._calibrates(compression) else nullcontext():
                path = parent.to_openvino(*args, **kwargs)
            promised = compression in (None, CompressionType.FP16) or (
                self._calibrates(compression) and data is not None
            )
            precision = "FP32" if compression is None else CompressionType(compression).name
            write_openvino(path, describe(self, *self._thresholds_of, precision, promised))
            keep_precise(path, count_convolutions(self.model.feature_extractor))
        finally:
            self._thresholds_of = ()
        return path

    def _compress_ov_model(
        self, model: Any, compression_type: Any = None, datamodule: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Compress as anomalib does, and set the thresholds through the compressed graph."""
        parent: Any = super()
        result = parent._compress_ov_model(model, compression_type, datamodule, *args, **kwargs)
        (post,) = self._thresholds_of or (None,)
        if post is None or not self._calibrates(compression_type):
            return result
        thresholds = GraphThresholds(result, len(self.products))
        if datamodule is None:
            rank_zero_warn(
                f"{compression_type.name} moves the scores, and the thresholds were set before it: give the export the "
                "training's data module (--data) to have them set again."
            )
        else:
            data = self._chosen(datamodule).data
            self._raise_for_others(data, post)
            images = fitting(model, (data[index].image[None].numpy() for index in range(len(data))))
            scores = thresholds.scores(images)
            post.calibrate(*scores, count=len(self.products))
        for name in NAMES:
            thresholds.set(name, post.get_buffer(name))
        return result

    def _post_training_quantization_ov(self, model: Any, datamodule: AnomalibDataModule | None = None) -> Any:
        """Quantise as anomalib does for INT8_PTQ, but the backbone behind its stem only, and with the training images.

        anomalib takes the validation images, which are often the test set. Those that the threshold comes from are not
        among them.
        """
        if datamodule is None:
            msg = "INT8_PTQ sets its ranges with training images: give the export a data module (--data)."
            raise ValueError(msg)
        kept = self._chosen(datamodule).kept
        data: Any = datamodule.train_data
        places = list(range(len(data))) if kept is None else kept
        step = max(1.0, len(places) / RANGE_IMAGES)
        chosen = [places[int(k * step)] for k in range(min(RANGE_IMAGES, len(places)))]
        images = list(fitting(model, (data[place].image[None].numpy() for place in chosen)))
        return quantize(model, images, count_convolutions(self.model.feature_extractor))

    def _calibrates(self, compression: Any) -> bool:
        """Whether thresholds are set again: of quantised graphs, whose scores are normalised around a threshold."""
        post = self.post_processor
        plain = getattr(post, "enable_normalization", False) and getattr(post, "enable_thresholding", False)
        plain = plain and post.image_sensitivity == post.pixel_sensitivity == 0.5
        return compression in CALIBRATED and plain and getattr(post, "false_alarm_rate", None) is not None

    def _raise_for_others(self, data: Any, post: Any) -> None:
        """Refuse images that the model's thresholds do not come from: by their scores in f32."""
        ours = score_images(self, data).scores.sort().values
        theirs = post.calibration_scores.cpu().sort().values
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3):
            msg = (
                f"The thresholds come from {len(theirs)} other images than the {len(ours)} that this data has for them,"
                " so the rate of a quantised export is not known: give --data as in the training, with its seed, or "
                "export a model whose thresholds were moved in FP32 or FP16."
            )
            raise ValueError(msg)

    def _chosen(self, datamodule: AnomalibDataModule) -> Any:
        """Find the images that the threshold of a training with this data comes from."""
        datamodule.setup("fit")
        return choose(datamodule, self.settings.calibration_ratio)

    def _check_exportable(self) -> None:
        if not self.model.solver.exportable:
            raise WTFlowError(not_exportable(self.model.solver.name))
        broken = next(broken_tensors(self.model.state_dict()), None)
        if broken is not None:
            msg = f"'{broken}' of the model is NaN or infinite: load another checkpoint, or train the model again."
            raise WTFlowError(msg)
        if isinstance(self.post_processor, WTFlowPostProcessor):
            self.post_processor.raise_for_no_threshold()
