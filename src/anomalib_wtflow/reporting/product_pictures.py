"""Pictures of several products."""

from pathlib import Path
from typing import Any

from anomalib.visualization import ImageVisualizer

from anomalib_wtflow.writing import one_sentence_for

WAY = "make room there, or do without them by --model.visualizer false"


class ProductVisualizer(ImageVisualizer):
    """anomalib's visualizer, with a folder for each product: the images' own, or the one that the model recognises.

    Images that lie below a folder of the data module's name keep the order that they lie in. Of a model of one product,
    pictures lie where anomalib puts them.
    """

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Save the pictures of a batch.

        Raises:
            RuntimeError: If the disk is full or the folder cannot be written to.
        """
        names = getattr(batch, "product", None)
        if names is None and len(pl_module.product_names) > 1:
            names = pl_module.recognised(batch.recognition)
        whole = Path(trainer.default_root_dir) / "images" if self.output_dir is None else Path(self.output_dir)
        above = str(getattr(getattr(trainer, "datamodule", None), "name", "")).lower()
        try:
            with one_sentence_for("The pictures", whole, WAY):
                for item, name in zip(batch, names or [""] * batch.batch_size, strict=True):
                    inside = above in (part.lower() for part in Path(item.image_path or "").parts)
                    self.output_dir = whole if inside else whole / name
                    super().on_test_batch_end(trainer, pl_module, outputs, [item], *args)  # type: ignore[arg-type]
        finally:
            self.output_dir = whole
