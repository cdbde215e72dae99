"""Drawing of a synthetic part."""

import math

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

DEFECTS = ("scratch", "stain", "missing")

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


def _photograph(rng: np.random.Generator, part: Array, steel: Array, felt: Array) -> Array:
    """Put a part on the mat under an uneven light, with a sensor's noise; RGB, uint8 ``(size, size, 3)``."""
    size = len(part)
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    light = 1 + 0.06 * (rng.uniform(-1, 1) * (xs / size - 0.5) + rng.uniform(-1, 1) * (ys / size - 0.5))
    grey = (part * steel + (1 - part) * felt) * light * rng.uniform(0.96, 1.04)
    tint = part[..., None] * np.array([1.0, 1.0, 1.02]) + (1 - part[..., None]) * np.array([0.85, 0.95, 1.15])
    image = np.clip(grey[..., None] * tint + 0.008 * rng.standard_normal((size, size, 3)), 0, 1)
    return (255 * image).round().astype(np.uint8)


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

    return _photograph(rng, part, steel, felt), mask > 0.25
