"""Pseudo-anomalies: altered copies of good images, in image space, for criteria that need no test label (ours).

All images are ``(3, H, W)`` arrays in [0, 1]. Everything is drawn from the generator that is given.
"""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

Draw = np.random.Generator
Alter = Callable[[np.ndarray, np.ndarray, Draw], np.ndarray]


def field(draw: Draw, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Smooth noise of mean 0 and deviation 1."""
    values = gaussian_filter(draw.standard_normal(shape), scale, mode="wrap")
    return (values - values.mean()) / values.std()


def blob(draw: Draw, shape: tuple[int, int], share: float) -> np.ndarray:
    """Soft mask of a ragged blob that covers about a share of the image, as ``(1, H, W)``."""
    side = min(shape)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    row, column = (draw.uniform(0.2, 0.8) * length for length in shape)
    radius = side * np.sqrt(share * 3 / np.pi) * 0.6
    height = field(draw, shape, draw.uniform(6, 16)) - ((rows - row) ** 2 + (columns - column) ** 2) / (2 * radius**2)
    return gaussian_filter((height > np.quantile(height, 1 - share)).astype(np.float32), 1.0)[None]


def _blend(mask: np.ndarray, other: np.ndarray, image: np.ndarray) -> np.ndarray:
    return mask * other + (1 - mask) * image


def _in_blob(changed: np.ndarray, image: np.ndarray, draw: Draw) -> np.ndarray:
    return _blend(blob(draw, image.shape[1:], _area(draw)), changed, image)


def _area(draw: Draw) -> float:
    return float(np.exp(draw.uniform(np.log(0.003), np.log(0.04))))


def blur(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob that is out of focus."""
    del other
    return _in_blob(gaussian_filter(image, (0, 3, 3)), image, draw)


def tone(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob that is brighter or darker by 15 to 50 %."""
    del other
    changed = (image * (1 + draw.choice([-1, 1]) * draw.uniform(0.15, 0.5))).clip(0, 1)
    return _in_blob(changed, image, draw)


def cut_paste(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob from elsewhere in the same image, turned by a multiple of 90 degrees (Li et al., 2021)."""
    del other
    shift = tuple(draw.integers(length // 8, length - length // 8) for length in image.shape[1:])
    turns = draw.integers(4) if image.shape[1] == image.shape[2] else 2 * draw.integers(2)
    return _in_blob(np.roll(np.rot90(image, turns, (1, 2)), shift, (1, 2)), image, draw)


def texture(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob into which an image of another data set is blended by 20 to 70 % (as Zavrtanik et al., 2021)."""
    share = draw.uniform(0.2, 0.7)
    return _in_blob((1 - share) * image + share * other, image, draw)


def grain(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob with fine noise."""
    del other
    noise = draw.uniform(0.08, 0.25) * field(draw, image.shape[1:], draw.uniform(0.7, 2))
    return _in_blob((image + noise).clip(0, 1), image, draw)


def warp(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob that is bent by some pixels."""
    del other
    scale, reach = draw.uniform(6, 14), draw.uniform(3, 8)
    mask = blob(draw, image.shape[1:], 3 * _area(draw))[0]
    rows, columns = np.mgrid[: image.shape[1], : image.shape[2]].astype(float)
    at = [line + mask * reach * field(draw, image.shape[1:], scale) for line in (rows, columns)]
    return np.stack([map_coordinates(channel, at, order=1, mode="nearest") for channel in image])


def line(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A thin wavy line, brighter or darker."""
    del other
    rows, columns = np.mgrid[: image.shape[1], : image.shape[2]]
    row, column = (draw.uniform(0.15, 0.85) * length for length in image.shape[1:])
    along, across = Rotation.from_euler("z", draw.uniform(0, np.pi)).as_matrix()[:2, :2] @ np.stack(
        [(columns - column).ravel(), (rows - row).ravel()]
    )
    across = across + draw.uniform(2, 6) * np.sin(along / draw.uniform(8, 20))
    inside = np.exp(-((across / draw.uniform(0.8, 2.2)) ** 2)) * (np.abs(along) < draw.uniform(10, 45))
    changed = (image + draw.choice([-1, 1]) * draw.uniform(0.15, 0.5)).clip(0, 1)
    return _blend(inside.reshape(1, *image.shape[1:]), changed, image)


def erase(image: np.ndarray, other: np.ndarray, draw: Draw) -> np.ndarray:
    """A blob in which all detail is missing."""
    del other
    return _in_blob(gaussian_filter(image, (0, 10, 10)), image, draw)


KINDS: dict[str, Alter] = {
    "blur": blur,
    "tone": tone,
    "cut-paste": cut_paste,
    "texture": texture,
    "grain": grain,
    "warp": warp,
    "line": line,
    "erase": erase,
}


def drift(image: np.ndarray, draw: Draw) -> np.ndarray:
    """The same part under another light and focus: gain, gamma, noise and blur of the whole image. Not a defect."""
    image = image.clip(0, 1) ** draw.uniform(0.85, 1.18) * draw.uniform(0.85, 1.15)
    image = gaussian_filter(image, (0, *[draw.uniform(0, 0.8)] * 2))
    return (image + draw.uniform(0, 0.02) * draw.standard_normal(image.shape)).clip(0, 1)
