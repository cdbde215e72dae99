"""The drawn data set: reproducible, and its masks say where the defects are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_wtflow import SyntheticParts
from anomalib_wtflow.data.drawing import DEFECTS, draw_part


def test_same_seed_same_part() -> None:
    for defect in (None, *DEFECTS):
        first, second = draw_part(3, 96, defect), draw_part(3, 96, defect)
        assert np.array_equal(first[0], second[0])
        assert np.array_equal(first[1], second[1])
    assert not np.array_equal(draw_part(3, 96)[0], draw_part(4, 96)[0])


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("seed", range(12))
def test_mask_is_where_the_defect_is(defect: str, seed: int) -> None:
    """The same seed draws the same part with and without the defect, so their difference is the defect."""
    (good, none), (bad, mask) = draw_part(seed, 256), draw_part(seed, 256, defect)
    assert not none.any()
    assert 20 < mask.sum() < 0.05 * mask.size
    difference = np.abs(good.astype(int) - bad.astype(int)).max(axis=2)
    assert (difference[mask] > 8).mean() > 0.97
    near = np.zeros_like(mask)
    ys, xs = mask.nonzero()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near[np.clip(ys + dy, 0, 255), np.clip(xs + dx, 0, 255)] = True
    assert difference[~near].max() == 0


def test_products_differ() -> None:
    """Product 0 is the flange; each has a shape of its own."""
    assert (draw_part(5, 48)[0] == draw_part(5, 48, product=0)[0]).all()
    pictures = [draw_part(5, 48, product=product)[0].astype(int) for product in range(9)]
    for k, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 2 for other in pictures[:k])


def test_layout(parts: SyntheticParts) -> None:
    parts.prepare_data()
    parts.setup()
    root = Path(parts.root)
    assert len(list((root / "train/good").glob("*.png"))) == len(parts.train_data) == 16
    assert len(parts.val_data) + len(parts.test_data) == 20 + 3 * 4
    assert not set(parts.val_data.samples.image_path) & set(parts.test_data.samples.image_path)
    for _, row in parts.test_data.samples.iterrows():
        assert bool(row.mask_path) == bool(row.label_index)
        if row.mask_path:
            assert Path(row.mask_path).parent.name == Path(row.image_path).parent.name
            assert Image.open(row.mask_path).size == Image.open(row.image_path).size == (128, 128)


def test_setup_draws_by_itself_and_only_once(tmp_path: Path) -> None:
    data = SyntheticParts(tmp_path, train_images=2, test_images=2, defect_images=1, side=32)
    data.setup()
    first = Path(data.root) / "train/good/000.png"
    stamp = first.stat().st_mtime_ns
    SyntheticParts(tmp_path, train_images=2, test_images=2, defect_images=1, side=32).setup()
    assert first.stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".drawing*"))


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SyntheticParts(tmp_path, train_images=2, test_images=2, defect_images=1, side=32)
    monkeypatch.setattr(
        "anomalib_wtflow.data.synthetic.json.dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert not list(tmp_path.iterdir())


def test_an_interrupted_drawing_is_drawn_again(tmp_path: Path) -> None:
    data = SyntheticParts(tmp_path, train_images=2, test_images=2, defect_images=1, side=32)
    (Path(data.root) / "train/good").mkdir(parents=True)
    data.setup()
    assert len(data.train_data) == 2


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="asked for 0, 40 and 16 images of 256 pixels"):
        SyntheticParts(tmp_path, train_images=0)
    with pytest.raises(ValueError, match="Unknown defect 'dent': choose one of scratch, stain, missing"):
        draw_part(0, 64, "dent")
