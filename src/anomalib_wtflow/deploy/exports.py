"""Exports: what anomalib's leave to a model."""

from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule

from anomalib_wtflow.deploy.quantization import count_convolutions, keep_precise, quantize
from anomalib_wtflow.flow.solver import not_exportable

OPSET = 18
CALIBRATION_IMAGES = 128
"""Training images that set the ranges of a quantised export."""


class Exports:
    """Mixin before anomalib's ``ExportMixin``, whose methods are the only way into its exports.

    It refuses adaptive solvers, keeps the backbone's stem in f32 whatever precision a runtime chooses, and quantises
    the backbone behind its stem only, with training images.
    """

    model: Any

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does.

        Raises:
            ValueError: If the solver is adaptive, and so does not export.
        """
        self._check_exportable()
        return super().to_torch(*args, **kwargs)  # type: ignore[misc]

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Export as anomalib does, to ONNX and, on the way, to OpenVINO.

        Raises:
            ValueError: If the solver is adaptive, and so does not export.
        """
        self._check_exportable()
        # anomalib asks for 14, to which torch's exporter, which writes 18, fails to convert, with a traceback.
        return super().to_onnx(*args, **{"opset_version": OPSET, "verbose": False, **kwargs})  # type: ignore[misc]

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does; whatever precision the runtime chooses, the backbone's stem stays in f32.

        Raises:
            ValueError: If the solver is adaptive, and so does not export.
        """
        path = super().to_openvino(*args, **kwargs)  # type: ignore[misc]
        keep_precise(path, count_convolutions(self.model.feature_extractor))
        return path

    def _post_training_quantization_ov(self, model: Any, datamodule: AnomalibDataModule | None = None) -> Any:
        """Quantise as anomalib does for INT8_PTQ, but the backbone behind its stem only, and with the training images.

        anomalib takes the validation images, which are often the test set.
        """
        if datamodule is None:
            msg = "INT8_PTQ sets its ranges with training images: give the export a data module (--data)."
            raise ValueError(msg)
        datamodule.setup("fit")
        images: list[Any] = []
        for batch in datamodule.train_dataloader():
            images.extend(batch.image.numpy()[:, None])
            if len(images) >= CALIBRATION_IMAGES:
                break
        convolutions = count_convolutions(self.model.feature_extractor)
        return quantize(model, images[:CALIBRATION_IMAGES], convolutions)

    def _check_exportable(self) -> None:
        if not self.model.solver.exportable:
            raise ValueError(not_exportable(self.model.solver.name))
