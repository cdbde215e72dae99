"""Synthetic parts: a small drawn data set for a first run without data or network."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from anomalib.data import Folder
from anomalib.data.utils import TestSplitMode, ValSplitMode
from PIL import Image

from anomalib_wtflow._registration import register_datamodule
from anomalib_wtflow.data.drawing import DEFECTS, draw_part
from anomalib_wtflow.errors import WTFlowError

VERSION = 1
"""Raised when the drawings change, so that an old folder is not taken for a new one."""


@register_datamodule
class SyntheticParts(Folder):
    """Drawn flanges with scratches, stains and missing pieces, and their masks.

    Synthetic: what a model scores here proves nothing about real parts.

    The images are drawn once, below ``root``, in MVTec's folder layout. Validation is a part of the test set by
    default, as in anomalib's ``Folder``.

    Args:
        root: Folder to draw into; each combination of sizes and seed gets its own folder there.
        train_images: Good parts to train on.
        test_images: Good parts to test on.
        defect_images: Defective parts of each kind to test on.
        side: Side of the images in pixels, at least 32. (Not `image_size`: anomalib turns that name into a tuple.)
        product: Which of the drawn products: 0 is a flange, others have other outlines, holes and colours.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Loader processes.
        val_split_mode: As in anomalib.
        val_split_ratio: As in anomalib.
        seed: Seed of the drawings and of the split.

    Raises:
        WTFlowError: If a number of images or the size is too small.
    """

    def __init__(
        self,
        root: str | Path = "./datasets/SyntheticParts",
        train_images: int = 64,
        test_images: int = 40,
        defect_images: int = 16,
        side: int = 256,
        product: int = 0,
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TEST,
        val_split_ratio: float = 0.5,
        seed: int = 0,
    ) -> None:
        if min(train_images, test_images, defect_images) < 1 or side < 32 or product < 0:
            msg = (
                f"SyntheticParts was asked for {train_images}, {test_images} and {defect_images} images of "
                f"{side} pixels: draw at least 1 of each kind, of at least 32 pixels (and of product 0, 1, …)."
            )
            raise WTFlowError(msg)
        self.train_images, self.test_images, self.defect_images = train_images, test_images, defect_images
        self.side, self.product = side, product
        which = f"_product{product}" if product else ""
        folder = Path(root) / f"v{VERSION}_{train_images}_{test_images}_{defect_images}_{side}px_seed{seed}{which}"
        super().__init__(
            name="SyntheticParts",
            root=folder,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{defect}" for defect in DEFECTS],
            mask_dir=[f"ground_truth/{defect}" for defect in DEFECTS],
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Draw the images, unless they exist; an interrupted drawing leaves nothing behind."""
        folder = Path(self.root)  # type: ignore[arg-type]
        if (folder / "about.json").is_file():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        drawing = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".drawing-"))
        try:
            self._draw(drawing)
            drawing.chmod(0o755)  # mkdtemp's is 0o700, and data sets are shared
            try:
                drawing.rename(folder)
            except OSError:
                if not (folder / "about.json").is_file():  # else another process was faster
                    shutil.rmtree(folder)
                    drawing.rename(folder)
        finally:
            shutil.rmtree(drawing, ignore_errors=True)

    def _draw(self, folder: Path) -> None:
        sets: list[tuple[str, int, str | None]] = [
            ("train/good", self.train_images, None),
            ("test/good", self.test_images, None),
            *((f"test/{defect}", self.defect_images, defect) for defect in DEFECTS),
        ]
        seed = 100_000 * (self.seed or 0)
        for name, count, defect in sets:
            (folder / name).mkdir(parents=True)
            masks = folder / name.replace("test", "ground_truth")
            if defect:
                masks.mkdir(parents=True)
            for index in range(count):
                image, mask = draw_part(seed, self.side, defect, self.product)
                Image.fromarray(image).save(folder / name / f"{index:03d}.png")
                if defect:
                    Image.fromarray(255 * mask.astype(np.uint8)).save(masks / f"{index:03d}.png")
                seed += 1
        about = {"what": "synthetic images drawn by anomalib-wtflow", "version": VERSION, "seed": self.seed}
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")

    def _setup(self, _stage: str | None = None) -> None:
        self.prepare_data()
        super()._setup(_stage)
