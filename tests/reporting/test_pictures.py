"""Where pictures lie: at anomalib's names, and those that would overwrite each other apart."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from anomalib.data import Folder, PredictDataset

from anomalib_wtflow import WTFlow
from anomalib_wtflow.reporting.product_pictures import apart, images_of
from conftest import quiet_engine


def test_further_folders_keep_pictures_of_one_name_apart() -> None:
    """As many as it takes, for all that share a name, and for no other."""

    def places(*paths: str, folder: str = "") -> list[str]:
        pictures = {path: (folder, Path(*Path(path).parts[-2:])) for path in paths}
        more = apart(pictures)
        assert more.keys() <= pictures.keys()
        return [str(Path(folder, more.get(path, ""), name)) for path, (folder, name) in pictures.items()]

    assert places("/d/x/a/1.png", "/d/x/a/2.png", "/d/x/b/1.png") == ["a/1.png", "a/2.png", "b/1.png"]
    assert places("/d/x/a/1.png", "/d/y/a/1.png", "/d/y/a/2.png") == ["x/a/1.png", "y/a/1.png", "a/2.png"]
    deep = ("/d/p/x/a/1.png", "/d/q/x/a/1.png", "/d/q/y/a/1.png")
    assert places(*deep) == ["p/x/a/1.png", "q/x/a/1.png", "y/a/1.png"]
    assert places(*deep, folder="bolt") == ["bolt/p/x/a/1.png", "bolt/q/x/a/1.png", "bolt/y/a/1.png"]
    assert places("/a/1.png", "/x/a/1.png", "/y/x/a/1.png") == ["a/1.png", "x/a/1.png", "y/x/a/1.png"]
    assert places("/d/x/../a/1.png", "/d/x/a/1.png") == ["d/a/1.png", "x/a/1.png"]  # nothing leads out of the folder
    assert places("/d/a/1.png", "/d/x/../a/1.png") == ["d/a/1.png", "d/a/1.png"]  # one image


def test_pictures_of_different_products_need_no_further_folders() -> None:
    paths = ["/d/x/a/1.png", "/d/y/a/1.png"]
    assert apart({path: (name, Path("a/1.png")) for path, name in zip(paths, ("bolt", "nut"), strict=True)}) == {}


def test_what_a_data_set_lists(small: SimpleNamespace) -> None:
    good = small.root / "test" / "good"
    assert images_of(PredictDataset(good)) == {str(path): "" for path in sorted(good.iterdir())}
    samples = pd.DataFrame({"image_path": ["a.png", "b.png"]})
    assert images_of(SimpleNamespace(samples=samples)) == {"a.png": "", "b.png": ""}
    samples["product"] = ["bolt", "nut"]
    assert images_of(SimpleNamespace(samples=samples)) == {"a.png": "bolt", "b.png": "nut"}
    assert images_of(None) == images_of([1, 2]) == {}


@pytest.mark.parametrize("tested", [True, False])
def test_pictures_of_images_of_one_name_do_not_overwrite_each_other(
    small: SimpleNamespace, tmp_path: Path, tested: bool
) -> None:
    """Nor with anomalib's ``Folder`` of another name than those of the images' folders."""
    good = sorted((small.root / "test" / "good").iterdir())
    for image, place in zip(good, ("x/a/1.png", "y/a/1.png", "y/a/2.png"), strict=False):
        (tmp_path / "deep" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "deep" / place)
    model, engine = WTFlow.load_from_checkpoint(small.checkpoint), quiet_engine(tmp_path / "results")
    if tested:
        root, options = tmp_path / "deep", {"test_split_mode": "from_dir", "val_split_mode": "none", "num_workers": 0}
        data = Folder("parts", "x/a", root, normal_test_dir=["x/a", "y/a"], **options)
        engine.test(model, datamodule=data, verbose=False)
    else:
        engine.predict(model, data_path=tmp_path / "deep")
    (images,) = (tmp_path / "results").rglob("images")
    assert sorted(str(path.relative_to(images)) for path in images.rglob("*.png")) == [
        "a/2.png",
        "x/a/1.png",
        "y/a/1.png",
    ]
    assert (images / "x/a/1.png").read_bytes() != (images / "y/a/1.png").read_bytes()
