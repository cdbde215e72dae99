"""Pictures of the gallery: what is drawn where, and how much of it a page bears."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import SIDE, model_of, scored, write_images
from PIL import Image

from anomalib_wtflow.diagnosis import gallery


def opened(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


def test_pictures_keep_their_proportions(tmp_path: Path) -> None:
    (image,) = write_images(tmp_path, [("scratch", 3.0, 0)])
    for size, expected in (((1200, 600), (480, 240)), ((96, 128), (180, 240)), ((300, 200), (300, 200))):
        Image.new("RGB", size, (10, 20, 200)).save(image.path)
        (entry,) = gallery.entries(model_of([1.0]), [(image, {})])
        for name in ("picture", "heat"):
            assert opened(entry[name]).size == expected
        assert np.asarray(opened(entry["picture"]))[5, 5].tolist() == pytest.approx([10, 20, 200], abs=6)


def test_the_map_is_bright_under_the_defect_and_outlined() -> None:
    image = scored("scratch/0.png", True, 3.0)
    picture = Image.new("RGB", (4 * SIDE, 4 * SIDE))
    drawn = np.asarray(gallery.heat_map(image, picture, 1.0)).astype(int)
    inside, outside = drawn[4 * 24, 4 * 32], drawn[4 * 50, 4 * 32]
    assert inside.sum() > outside.sum() + 200
    assert tuple(drawn[4 * 16 + 1, 4 * 32]) == gallery.CALLED  # at the upper edge of the square
    only_marked = image._replace(called_mask=torch.zeros(SIDE, SIDE, dtype=torch.bool))
    drawn = np.asarray(gallery.heat_map(only_marked, picture, 1.0))
    assert tuple(drawn[4 * 16 + 1, 4 * 32]) == gallery.MARKED
    assert tuple(drawn[4 * 24, 4 * 32]) != gallery.MARKED


def test_a_page_bears_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn until their bytes are used up, in order."""
    images = write_images(tmp_path, [("good", 0.5, 0)] * 5)
    rows = [(image, {"order": k}) for k, image in enumerate(images)]
    sizes = [len(entry["picture"]) + len(entry["heat"]) for entry in gallery.entries(model_of([1.0]), rows)]
    assert len(sizes) == 5
    monkeypatch.setattr(gallery, "CHARACTERS", sum(sizes[:3]))
    assert [entry["order"] for entry in gallery.entries(model_of([1.0]), rows)] == [0, 1, 2]
