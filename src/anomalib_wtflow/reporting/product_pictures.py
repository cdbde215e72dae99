"""Pictures of several products, and of images in several folders."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer

from anomalib_wtflow.reporting.data_sets import datasets, image_paths
from anomalib_wtflow.writing import one_sentence_for

WAY = "make room there, or do without them by --model.visualizer false"


class ProductVisualizer(ImageVisualizer):
    """anomalib's visualizer, with a folder for each product: the images' own, or the one that the model recognises.

    Images that lie below a folder of the data module's name keep the order that they lie in. Of a model of one product,
    pictures lie where anomalib puts them, but for those that would overwrite each other (:func:`apart`).
    """

    _apart: Mapping[str, Path] = {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the images whose pictures would have one name."""
        del pl_module
        pictures = {
            path: ("" if _inside(trainer, path) else product, _name(trainer, path))
            for dataset in datasets(trainer)
            for path, product in images_of(dataset).items()
        }
        self._apart = apart(pictures)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the images whose pictures would have one name."""
        self.on_test_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Save the pictures of a batch.

        Raises:
            RuntimeError: If the disk is full or the folder cannot be written to.
        """
        names = getattr(batch, "product", None)
        if names is None and len(pl_module.product_names) > 1:
            names = pl_module.recognised(batch.recognition)
        whole = Path(trainer.default_root_dir) / "images" if self.output_dir is None else Path(self.output_dir)
        try:
            with one_sentence_for("The pictures", whole, WAY):
                for item, name in zip(batch, names or [""] * batch.batch_size, strict=True):
                    path = str(item.image_path or "")
                    self.output_dir = whole / ("" if _inside(trainer, path) else name) / self._apart.get(path, "")
                    super().on_test_batch_end(trainer, pl_module, outputs, [item], *args)  # type: ignore[arg-type]
        finally:
            self.output_dir = whole


def _inside(trainer: Any, path: str) -> bool:
    """Whether an image lies below a folder of the data module's name."""
    above = str(getattr(getattr(trainer, "datamodule", None), "name", "")).lower()
    return above in (part.lower() for part in Path(path).parts)


def _name(trainer: Any, path: str) -> Path:
    """Return the name that anomalib gives the picture of an image: folders of the image's path, and its name."""
    data = getattr(trainer, "datamodule", None)
    name, category = getattr(data, "name", None), getattr(data, "category", None)
    return generate_output_filename(path, "", name, category, mkdir=False)


def images_of(dataset: Any) -> dict[str, str]:
    """List the images of a data set of anomalib's or ours, with their products where it tells them; else none."""
    samples: Any = getattr(dataset, "samples", ())
    paths = image_paths(dataset, masks=False)
    return dict(zip(paths, samples["product"], strict=True)) if "product" in samples else dict.fromkeys(paths, "")


def apart(pictures: Mapping[str, tuple[str, Path]]) -> dict[str, Path]:
    """Find the folders that keep pictures of one name apart: as many more of each image's path as it takes.

    Args:
        pictures: By the path of an image, the folder and the name of its picture, which is the end of that path.

    Returns:
        By the paths of those that share their name with others: the folders to put between the two.
    """
    whole = {path: Path(os.path.normpath(Path(path).absolute())).parts for path in pictures}
    above = {path: list(whole[path][1 : -len(name.parts)]) for path, (_, name) in pictures.items()}
    more: dict[str, Path] = {}
    while True:
        places = {path: Path(folder, more.get(path, ""), name) for path, (folder, name) in pictures.items()}
        count = Counter(places.values())
        shared = [path for path in pictures if count[places[path]] > 1 and above[path]]
        if not shared:
            return more
        for path in shared:
            more[path] = Path(above[path].pop(), more.get(path, ""))
