"""Drawing of a synthetic part."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

DEFECTS = ("scratch", "stain", "missing")

Array = np.ndarray


class Shape(NamedTuple):
    """The shape of a drawn product; lengths in image sides, shades from 0 to 1.

    Attributes:
        sides: Corners of the outline; 0 for a circle.
        bore: Radius of the hole in the middle.
        holes: Number of holes around it.
        hole: Their radius.
        ring: Radius of the circle that they lie on.
        shade: Of the metal.
        mat: Of what the part lies on.
        rings: How fine the brushed rings are.
        tint: Of the metal, in red, green and blue.
        felt: Of what it lies on.
    """

    sides: int = 0
    bore: float = 0.13
    holes: int = 6
    hole: float = 0.035
    ring: float = 0.26
    shade: float = 0.62
    mat: float = 0.22
    rings: float = 2.2
    tint: tuple[float, ...] = (1.0, 1.0, 1.02)
    felt: tuple[float, ...] = (0.85, 0.95, 1.15)


def shape_of(product: int) -> Shape:
    """Return the shape of a drawn product; product 0 is a brushed flange."""
    if product == 0:
        return Shape()
    rng = np.random.default_rng([product, 2])
    return Shape(
        sides=int(rng.choice([0, 3, 4, 5, 6, 8])),
        bore=float(rng.uniform(0.04, 0.14)),
        holes=int(rng.integers(3, 9)),
        hole=float(rng.uniform(0.02, 0.04)),
        ring=float(rng.uniform(0.21, 0.25)),
        shade=float(rng.uniform(0.45, 0.75)),
        mat=float(rng.uniform(0.1, 0.32)),
        rings=float(rng.uniform(1.0, 2.8)),
        tint=tuple(rng.uniform(0.75, 1.1, 3).tolist()),
        felt=tuple(rng.uniform(0.6, 1.2, 3).tolist()),
    )


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


def _rim(shape: Shape, angle: float, turn: float) -> float:
    """Return the outline's distance from the centre at an angle, relative to its corners."""
    if not shape.sides:
        return 1.0
    half = math.pi / shape.sides
    return math.cos(half) / math.cos((angle - turn) % (2 * half) - half)


def _outline(shape: Shape, x: float, y: float, radius: float, turn: float, size: int) -> Array:
    if not shape.sides:
        return _disc(x, y, radius, size)
    corners = [turn + k * 2 * math.pi / shape.sides for k in range(shape.sides)]
    return _polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in corners], size)


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


def _photograph(rng: np.random.Generator, part: Array, steel: Array, felt: Array, shape: Shape) -> Array:
    """Photograph a part: mat, uneven light and sensor noise; RGB, uint8 ``(size, size, 3)``."""
    size = len(part)
    ys, xs = np.mgrid[:size, :size].astype(np.float32)
    light = 1 + 0.06 * (rng.uniform(-1, 1) * (xs / size - 0.5) + rng.uniform(-1, 1) * (ys / size - 0.5))
    grey = (part * steel + (1 - part) * felt) * light * rng.uniform(0.96, 1.04)
    tint = part[..., None] * np.array(shape.tint) + (1 - part[..., None]) * np.array(shape.felt)
    image = np.clip(grey[..., None] * tint + 0.008 * rng.standard_normal((size, size, 3)), 0, 1)
    return (255 * image).round().astype(np.uint8)


def _damage(
    flaw: np.random.Generator,
    defect: str,
    shape: Shape,
    part: Array,
    steel: Array,
    place: tuple[float, float, float, float],
) -> tuple[Array, Array, Array]:
    """Damage a part at a place (centre, radius, turn); return part, steel and defect mask."""
    (cx, cy, radius, turn), size, apart = place, len(part), 2 * math.pi / shape.holes
    a = flaw.uniform(0, 2 * math.pi)
    if defect == "missing":
        rim = radius * _rim(shape, a, turn)
        chip = _blob(flaw, cx + rim * math.cos(a), cy + rim * math.sin(a), flaw.uniform(0.05, 0.09) * size, size)
        return part * (1 - chip), steel, chip * part
    # Near half way between two holes, and between the bore and the rim: on the metal, never on a hole.
    a = turn + apart / 2 + flaw.integers(shape.holes) * apart
    middle = (shape.ring - 0.01) * _rim(shape, a, turn) * size
    x, y = cx + middle * math.cos(a), cy + middle * math.sin(a)
    if defect == "scratch":
        length, width = flaw.uniform(0.15, 0.28) * size, flaw.uniform(0.008, 0.016) * size
        mask = part * _stroke(flaw, x, y, length, width, size)
        return part, steel + mask * (0.3 if flaw.random() < 0.5 else -0.3), mask
    mask = part * _blob(flaw, x, y, flaw.uniform(0.04, 0.08) * size, size)
    return part, steel - 0.22 * mask, mask


def draw_part(seed: int, size: int, defect: str | None = None, product: int = 0) -> tuple[Array, Array]:
    """Draw a brushed part with a bore and holes around it on a mat, and where it is defective.

    Position, angle, light and texture vary from part to part; nothing else does, except for the defect.

    Args:
        seed: Seed of the drawing: the same seed draws the same part, with or without a defect.
        size: Side of the image in pixels.
        defect: ``scratch``, ``stain``, ``missing`` (a piece broken off the rim), or None for a good part.
        product: Which product, see :func:`shape_of`.

    Returns:
        An RGB image, uint8 ``(size, size, 3)``, and the mask of the defect, bool ``(size, size)``.

    Raises:
        ValueError: If the defect is unknown.
    """
    if defect is not None and defect not in DEFECTS:
        msg = f"Unknown defect '{defect}': choose one of {', '.join(DEFECTS)}."
        raise ValueError(msg)
    shape, rng, flaw = shape_of(product), np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    cx, cy = size / 2 + rng.uniform(-0.02, 0.02, 2) * size
    radius, turn, apart = 0.38 * size, rng.uniform(-0.15, 0.15), 2 * math.pi / shape.holes
    ys, xs = np.mgrid[:size, :size].astype(np.float32)

    part = _outline(shape, cx, cy, radius, turn, size)
    part *= 1 - _disc(cx, cy, shape.bore * size, size)
    for k in range(shape.holes):
        angle = turn + k * apart
        x, y = cx + shape.ring * size * math.cos(angle), cy + shape.ring * size * math.sin(angle)
        part *= 1 - _disc(x, y, shape.hole * size, size)

    distance, angles = np.hypot(xs - cx, ys - cy), np.arctan2(ys - cy, xs - cx)
    brushed = 0.03 * np.sin(distance * (shape.rings + 0.05 * rng.uniform(-1, 1)) + 0.7 * _noise(rng, size, 6))
    shine = 0.08 * np.cos(2 * (angles - turn))
    steel = shape.shade + shine + brushed + 0.012 * _noise(rng, size, 0.7)
    felt = shape.mat + 0.02 * _noise(rng, size, 1.2) + 0.015 * _noise(rng, size, 12)

    mask = np.zeros((size, size), dtype=np.float32)
    if defect is not None:
        part, steel, mask = _damage(flaw, defect, shape, part, steel, (cx, cy, radius, turn))
    return _photograph(rng, part, steel, felt, shape), mask > 0.25
