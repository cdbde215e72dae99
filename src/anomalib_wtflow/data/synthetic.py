"""Synthetic parts: a small data set that the package draws by itself, for a first run without data or network."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from anomalib.data import Folder
from anomalib.data.utils import TestSplitMode, ValSplitMode
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from anomalib_wtflow._registration import register_datamodule

DEFECTS = ("scratch", "stain", "missing")
VERSION = 1
"""Raised when the drawings change, so that an old folder is not taken for a new one."""

Array = np.ndarray


def _noise(rng: np.random.Generator, size: int, blur: float) -> Array:
    """Return blurred unit-variance noise, ``(size, size)``."""
    values = gaussian_filter(rng.standard_normal((size, size)), blur, mode="wrap")
    return values / values.std()


def _polygon(points: list[tuple[float, float]], size: int) -> Array:
    """Rasterise a polygon with soft edges; 1 inside, ``(size, size)``."""
    scale = 4
    image = Image.new("L", (scale * size, scale * size))
    ImageDraw.Draw(image).polygon([(scale * x, scale * y) for x, y in points], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def _disc(x: float, y: float, radius: float, size: int) -> Array:
    return _polygon(
        [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64)], size
    )


def _blob(rng: np.random.Generator, x: float, y: float, radius: float, size: int) -> Array:
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    radii = radius * (1 + 0.3 * rng.uniform(-1, 1, len(angles)))
    return _polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], size)


def _stroke(rng: np.random.Generator, x: float, y: float, length: float, width: float, size: int) -> Array:
    """Rasterise a slightly bent stroke from (x, y)."""
    angle, bend = rng.uniform(0, 2 * math.pi), rng.uniform(-0.8, 0.8)
    points = []
    for u in np.linspace(-0.5, 0.5, 24):
        a = angle + bend * u
        points.append((x + u * length * math.cos(a), y + u * length * math.sin(a)))
    scale = 4
    image = Image.new("L", (scale * size, scale * size))
    line = [(scale * px, scale * py) for px, py in points]
    ImageDraw.Draw(image).line(line, fill=255, width=max(1, round(scale * width)), joint="curve")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def draw_part(seed: int, size: int, defect: str | None = None) -> tuple[Array, Array]:
    """Draw a brushed flange with a bore and six bolt holes on a felt mat, and where it is defective.

    Position, angle, light and texture vary from part to part; nothing else does, except for the defect.

    Args:
        seed: Seed of the drawing: the same seed draws the same part, with or without a defect.
        size: Side of the image in pixels.
        defect: ``scratch``, ``stain``, ``missing`` (a piece broken off the rim), or None for a good part.

    Returns:
        An RGB image, uint8 ``(size, size, 3)``, and the mask of the defect, bool ``(size, size)``.

    Raises:
        ValueError: If the defect is unknown.
    """
    if defect is not None and defect not in DEFECTS:
        msg = f"Unknown defect '{defect}': choose one of {', '.join(DEFECTS)}."
        raise ValueError(msg)
    rng = np.random.default_rng([seed, 0])
    flaw = np.random.default_rng([seed, 1])
    cx, cy = size / 2 + rng.uniform(-0.02, 0.02, 2) * size
    radius, turn = 0.38 * size, rng.uniform(-0.15, 0.15)
    ys, xs = np.mgrid[:size, :size].astype(np.float32)

    part = _disc(cx, cy, radius, size)
    part *= 1 - _disc(cx, cy, 0.13 * size, size)
    for k in range(6):
        angle = turn + k * math.pi / 3
        part *= 1 - _disc(cx + 0.26 * size * math.cos(angle), cy + 0.26 * size * math.sin(angle), 0.035 * size, size)

    distance, angles = np.hypot(xs - cx, ys - cy), np.arctan2(ys - cy, xs - cx)
    brushed = 0.03 * np.sin(distance * (2.2 + 0.05 * rng.uniform(-1, 1)) + 0.7 * _noise(rng, size, 6))
    shine = 0.08 * np.cos(2 * (angles - turn))
    steel = 0.62 + shine + brushed + 0.012 * _noise(rng, size, 0.7)
    felt = 0.22 + 0.02 * _noise(rng, size, 1.2) + 0.015 * _noise(rng, size, 12)

    mask = np.zeros((size, size), dtype=np.float32)
    a = flaw.uniform(0, 2 * math.pi)
    if defect == "missing":
        chip = _blob(flaw, cx + radius * math.cos(a), cy + radius * math.sin(a), flaw.uniform(0.05, 0.09) * size, size)
        mask = chip * part
        part = part * (1 - chip)
    elif defect is not None:
        # Near 30 degrees off a bolt hole, half way between the bore and the rim: on the metal, never on a hole.
        a = turn + math.pi / 6 + flaw.integers(6) * math.pi / 3
        x, y = cx + 0.25 * size * math.cos(a), cy + 0.25 * size * math.sin(a)
        if defect == "scratch":
            mask = part * _stroke(flaw, x, y, flaw.uniform(0.15, 0.28) * size, flaw.uniform(0.008, 0.016) * size, size)
            steel = steel + mask * (0.3 if flaw.random() < 0.5 else -0.3)
        else:
            mask = part * _blob(flaw, x, y, flaw.uniform(0.04, 0.08) * size, size)
            steel = steel - 0.22 * mask

    light = 1 + 0.06 * (rng.uniform(-1, 1) * (xs / size - 0.5) + rng.uniform(-1, 1) * (ys / size - 0.5))
    grey = (part * steel + (1 - part) * felt) * light * rng.uniform(0.96, 1.04)
    tint = part[..., None] * np.array([1.0, 1.0, 1.02]) + (1 - part[..., None]) * np.array([0.85, 0.95, 1.15])
    image = np.clip(grey[..., None] * tint + 0.008 * rng.standard_normal((size, size, 3)), 0, 1)
    return (255 * image).round().astype(np.uint8), mask > 0.25


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
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Loader processes.
        val_split_mode: As in anomalib.
        val_split_ratio: As in anomalib.
        seed: Seed of the drawings and of the split.

    Raises:
        ValueError: If a number of images or the size is too small.
    """

    def __init__(
        self,
        root: str | Path = "./datasets/SyntheticParts",
        train_images: int = 64,
        test_images: int = 40,
        defect_images: int = 16,
        side: int = 256,
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TEST,
        val_split_ratio: float = 0.5,
        seed: int = 0,
    ) -> None:
        if min(train_images, test_images, defect_images) < 1 or side < 32:
            msg = (
                f"SyntheticParts was asked for {train_images}, {test_images} and {defect_images} images of "
                f"{side} pixels: "
                "draw at least 1 of each kind, of at least 32 pixels."
            )
            raise ValueError(msg)
        self.train_images, self.test_images, self.defect_images = train_images, test_images, defect_images
        self.side = side
        folder = Path(root) / f"v{VERSION}_{train_images}_{test_images}_{defect_images}_{side}px_seed{seed}"
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
        """Draw the images, unless they are there already. An interrupted drawing leaves nothing behind."""
        folder = Path(self.root)  # type: ignore[arg-type]
        if (folder / "about.json").is_file():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        drawing = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".drawing-"))
        try:
            self._draw(drawing)
            drawing.chmod(0o755)  # mkdtemp's is 0o700, and data sets are shared
            if not (folder / "about.json").is_file():  # another process may have been faster
                if folder.exists():
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
                image, mask = draw_part(seed, self.side, defect)
                Image.fromarray(image).save(folder / name / f"{index:03d}.png")
                if defect:
                    Image.fromarray(255 * mask.astype(np.uint8)).save(masks / f"{index:03d}.png")
                seed += 1
        about = {"what": "synthetic images drawn by anomalib-wtflow", "version": VERSION, "seed": self.seed}
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")

    def _setup(self, _stage: str | None = None) -> None:
        self.prepare_data()
        super()._setup(_stage)
