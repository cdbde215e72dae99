"""Data sets that a factory can have: few images, odd folders, one-sided validation and test sets."""

import csv
import json
import math
import os
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils.path import validate_path
from anomalib.deploy import CompressionType
from anomalib.metrics import AUPIMO, AUROC, Evaluator
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from PIL import Image
from ready import ready
from scipy.stats import mannwhitneyu
from small import folder, model
from torch.utils.data import DataLoader

from anomalib_wtflow import Products, SyntheticParts, WTFlow, WTFlowPostProcessor, calibrate
from anomalib_wtflow.data.drawing import draw_part
from anomalib_wtflow.deploy.quantization import fitting
from anomalib_wtflow.operation.calibrate import ALPHA, could_tell
from anomalib_wtflow.operation.data import data_sets
from anomalib_wtflow.reporting.unjudged import warn_of_unlisted
from anomalib_wtflow.reporting.verdicts import read
from conftest import quiet_engine

NAME = "Prüfung 良品"


@pytest.fixture
def copy(small: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.root, tmp_path / "copy"))


def keep(root: Path, count: int) -> Path:
    """Leave so many training images."""
    for path in sorted((root / "train" / "good").iterdir())[count:]:
        path.unlink()
    return root


def fit(data: Any, tmp_path: Path, **kwargs: Any) -> WTFlow:
    trained = model(**kwargs)
    quiet_engine(tmp_path / "results").fit(trained, datamodule=data)
    assert trained.post_processor.image_threshold.isfinite().all()
    return trained


def metrics_of(data: Any, small: SimpleNamespace, tmp_path: Path) -> dict[str, float]:
    (metrics,) = quiet_engine(tmp_path / "results").test(
        model(), datamodule=data, ckpt_path=small.checkpoint, verbose=False
    )
    return dict(metrics)


# Few training images --------------------------------------------------------------------------------------------------


def alone(root: Path, **kwargs: Any) -> Folder:
    """Good images alone, of which anomalib sets a fifth aside."""
    return Folder("alone", "train/good", root, num_workers=0, seed=0, **kwargs)


def as_products(root: Path) -> Products:
    """The same images, below a folder of products."""
    target = root.parent / "plant" / "bolts"
    shutil.copytree(root / "train" / "good", target)
    return Products(root=target.parent, num_workers=0, seed=0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (alone, "The training set holds 1 normal images, too few to train and to set a threshold: give at least 2"),
        (folder, "and there is one, beside those for the threshold: give more normal images"),
        (as_products, "The product 'bolts' has 1 normal training images: give it at least 2, one to train on"),
    ],
)
def test_one_image_is_too_few(copy: Path, tmp_path: Path, make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(make(keep(copy, 1)), tmp_path)


class Unlucky(Folder):
    """A user's, whose own code fails, or has a value error of its own."""

    error: Exception

    def setup(self, stage: str | None = None) -> None:
        del stage
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), ValueError("of my own"), AttributeError("'val_data'")])
def test_an_error_of_a_users_data_module_shows(copy: Path, tmp_path: Path, error: Exception) -> None:
    """It is neither given a sentence that is for another one nor reduced to its text."""
    data = Unlucky("mine", "train/good", copy, num_workers=0)
    data.error = error
    with pytest.raises(type(error)) as raised:
        data_sets(data)
    assert raised.value is error
    with pytest.raises(type(error)) as raised:
        fit(data, tmp_path)
    assert raised.value is error
    if not isinstance(error, ValueError):
        with pytest.raises(type(error)) as raised:
            Products(members={"mine": data}).setup()
        assert raised.value is error


def test_an_error_in_a_test_is_not_one_of_few_training_images(
    copy: Path, small: SimpleNamespace, tmp_path: Path
) -> None:
    class Broken(WTFlow):
        def test_step(self, *args: Any, **kwargs: Any) -> Any:
            msg = "of the test"
            raise IndexError(msg)

    broken = Broken(image_size=64, false_alarm_rate=0.2, overrides={"plateau": 0.0})
    with pytest.raises(IndexError, match="of the test"):
        quiet_engine(tmp_path).test(broken, datamodule=folder(keep(copy, 1)), ckpt_path=small.checkpoint)


@pytest.mark.parametrize("count", [2, 4])
def test_a_folder_of_which_a_fifth_is_no_image(copy: Path, tmp_path: Path, count: int) -> None:
    """anomalib itself says "not enough values to unpack", to its own models, too."""
    with pytest.raises(ValueError, match=f"Of {count} normal images anomalib sets none aside to test and validate on"):
        fit(alone(keep(copy, count)), tmp_path)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        quiet_engine(tmp_path).fit(Padim(backbone="resnet18", pre_trained=False), datamodule=alone(copy))


@pytest.mark.parametrize(
    ("make", "count", "promised"),
    [(alone, 5, 1 / 2), (folder, 2, 1 / 6), (folder, 5, 1 / 6), (as_products, 3, 1 / 2), (as_products, 5, 1 / 2)],
)
def test_a_few_images_train_and_say_what_they_promise(
    copy: Path, tmp_path: Path, make: Any, count: int, promised: float
) -> None:
    """One image sets the threshold, or the five good ones of the validation set."""
    trained = fit(make(keep(copy, count)), tmp_path, false_alarm_rate=max(0.2, promised))
    assert trained.post_processor.promised_false_alarm_rate.item() == pytest.approx(promised)


def test_two_images_of_which_one_sets_the_threshold(copy: Path, tmp_path: Path) -> None:
    data = folder(keep(copy, 2), val_split_mode="same_as_test")
    with pytest.raises(ValueError, match="and there is one, beside those for the threshold: give more normal images"):
        fit(data, tmp_path, false_alarm_rate=0.5)
    trained = fit(data, tmp_path, overrides={"coupling": "worst_of_two"}, false_alarm_rate=0.5)
    assert trained.post_processor.promised_false_alarm_rate.item() == pytest.approx(1 / 2)


def test_the_same_image_over_and_over(copy: Path, tmp_path: Path) -> None:
    """A covariance of rank zero: the scores are finite, and other parts are anomalous."""
    paths = sorted((copy / "train" / "good").iterdir())
    for path in paths[1:]:
        shutil.copy(paths[0], path)
    trained = fit(folder(copy, val_split_mode="same_as_test"), tmp_path, false_alarm_rate=0.5)
    batches = quiet_engine(tmp_path).predict(trained.eval(), data_path=copy / "test" / "scratch")
    assert all(bool(batch.pred_label) and batch.pred_score.isfinite() for batch in batches)


def test_each_image_twice_gives_the_same_normalisation(copy: Path, tmp_path: Path) -> None:
    once = fit(folder(copy), tmp_path).model.normalization.state_dict()
    for path in sorted((copy / "train" / "good").iterdir()):
        shutil.copy(path, path.with_name(f"again-{path.name}"))
    twice = fit(folder(copy), tmp_path).model.normalization.state_dict()
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, rtol=1e-2, atol=1e-3, msg=name)


# Validation and test sets ---------------------------------------------------------------------------------------------


def test_validation_without_normal_images(copy: Path, tmp_path: Path) -> None:
    """The threshold comes from training images, then."""
    data = Folder("bad", "train/good", copy, "test/scratch", num_workers=0, seed=0, test_split_mode="none")
    trained = fit(data, tmp_path, false_alarm_rate=0.5)
    assert trained.post_processor.calibration_images.tolist() == [2]
    assert not (data.val_data.samples["label_index"] == 0).any()


def test_validation_without_anomalies(copy: Path, tmp_path: Path) -> None:
    data = Folder("good", "train/good", copy, normal_test_dir="test/good", num_workers=0, seed=0)
    assert fit(data, tmp_path).post_processor.calibration_images.tolist() == [5]
    with pytest.raises(ValueError, match="needs defective validation images, and there are none"):
        fit(data, tmp_path, false_alarm_rate=None)


def test_validation_of_one_image(copy: Path, tmp_path: Path) -> None:
    for path in sorted((copy / "test" / "good").iterdir())[2:]:
        path.unlink()
    data = Folder("good", "train/good", copy, normal_test_dir="test/good", num_workers=0, seed=0)
    trained = fit(data, tmp_path, false_alarm_rate=0.5)
    assert len(data.val_data) == len(data.test_data) == 1
    assert trained.post_processor.promised_false_alarm_rate.item() == pytest.approx(1 / 2)


def test_no_validation_set_at_all(copy: Path, tmp_path: Path) -> None:
    """anomalib's own models end with an AttributeError."""
    data = folder(copy, val_split_mode="none")
    with pytest.raises(ValueError, match=r"There is no validation set \(val_split_mode none\), which anomalib"):
        fit(data, tmp_path)
    with pytest.raises(AttributeError, match="val_data"):
        quiet_engine(tmp_path).fit(Padim(backbone="resnet18", pre_trained=False), datamodule=data)
    trained = model(false_alarm_rate=0.5)
    quiet_engine(tmp_path, limit_val_batches=0).fit(trained, datamodule=data)
    assert trained.post_processor.image_threshold.isfinite().all()


@pytest.mark.parametrize("sizes", [{"train_batch_size": 1}, {"eval_batch_size": 1}, {"eval_batch_size": 1000}])
def test_batch_sizes_do_not_change_the_statistics(
    copy: Path, tmp_path: Path, sizes: dict[str, int], small: SimpleNamespace
) -> None:
    overrides = {"plateau": 0.0, "coupling": "worst_of_two"}
    usual, other = (fit(folder(copy, **each), tmp_path, overrides=overrides) for each in ({}, sizes))
    for name, value in usual.model.normalization.state_dict().items():
        torch.testing.assert_close(other.model.normalization.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    if "train_batch_size" not in sizes:
        threshold = usual.post_processor.image_threshold
        torch.testing.assert_close(other.post_processor.image_threshold, threshold, rtol=1e-4, atol=0)
        rows = [metrics_of(folder(copy, **each), small, tmp_path) for each in ({}, sizes)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_a_batch_larger_than_the_data(copy: Path, tmp_path: Path) -> None:
    trained = fit(folder(copy, train_batch_size=1000), tmp_path)
    assert trained.trainer.global_step == 2  # one in each epoch


def test_a_batch_of_one_image(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and the batch size is 1: raise --data"):
        fit(folder(copy, train_batch_size=1), tmp_path)


def defects_alone(root: Path, masks: bool = True) -> Folder:
    return Folder(
        "bad",
        "train/good",
        root,
        "test/scratch",
        mask_dir="ground_truth/scratch" if masks else None,
        num_workers=0,
        test_split_mode="none",
        val_split_mode="same_as_test",
    )


def test_defects_alone_have_pixel_metrics(small: SimpleNamespace, tmp_path: Path) -> None:
    """Those of the masks, and none that compares images."""
    metrics = metrics_of(defects_alone(small.root), small, tmp_path)
    assert sorted(metrics) == ["pixel_AUROC", "pixel_F1Score"]
    trained = model()
    batches = quiet_engine(tmp_path).predict(trained, datamodule=defects_alone(small.root), ckpt_path=small.checkpoint)
    auroc = AUROC(fields=["anomaly_map", "gt_mask"])
    for batch in batches:
        auroc.update(batch)
    assert metrics["pixel_AUROC"] == pytest.approx(auroc.compute().item())
    assert metrics_of(defects_alone(small.root, masks=False), small, tmp_path) == {}


def test_metrics_that_need_good_images_are_left_out(small: SimpleNamespace, tmp_path: Path) -> None:
    evaluator = Evaluator(test_metrics=[AUPIMO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")])
    (metrics,) = quiet_engine(tmp_path).test(
        model(evaluator=evaluator), datamodule=defects_alone(small.root), ckpt_path=small.checkpoint, verbose=False
    )
    assert metrics == {}
    assert len(evaluator.test_metrics) == 1


def test_one_good_image_to_test_on(copy: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    for path in sorted((copy / "test" / "good").iterdir())[1:]:
        path.unlink()
    metrics = metrics_of(folder(copy, val_split_mode="same_as_test"), small, tmp_path)
    assert set(metrics) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}


def test_loaders_after_a_fit_are_looked_at_themselves(copy: Path, tmp_path: Path) -> None:
    """What can be measured is told by the images that are tested, not by the data module of the fit before."""
    trained, engine, data = model(), quiet_engine(tmp_path), folder(copy)
    engine.fit(trained, datamodule=data)
    good = alone(copy)
    good.normal_test_dir = "test/good"
    good.setup()
    assert not (good.test_data.samples["label_index"] == 1).any()
    results = [
        engine.test(trained, dataloaders=DataLoader(each, collate_fn=each.collate_fn), verbose=False)[0]
        for each in (good.test_data, data.test_data)
    ]
    assert results[0] == {}
    assert {"image_AUROC", "pixel_AUROC"} <= set(results[1])
    only = alone(copy)
    only.setup()
    one_sided = model(false_alarm_rate=0.5)
    engine = quiet_engine(tmp_path)
    engine.fit(one_sided, datamodule=only)
    assert (
        "image_AUROC"
        in engine.test(
            one_sided, dataloaders=DataLoader(data.test_data, collate_fn=data.test_data.collate_fn), verbose=False
        )[0]
    )


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "quote'\"[x]*"])
def test_odd_names(copy: Path, small: SimpleNamespace, tmp_path: Path, name: str) -> None:
    root = copy.rename(tmp_path / name)
    fit(folder(root), tmp_path)
    assert "image_AUROC" in metrics_of(folder(root), small, tmp_path)
    batches = quiet_engine(tmp_path).predict(model(), data_path=root / "test" / "good", ckpt_path=small.checkpoint)
    assert len(batches) == 10


def test_names_that_are_no_utf8(
    copy: Path, small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As files of another system have them: both tables stay readable, and what is printed is what they say."""
    good = copy / "test" / "good"
    (good / "000.png").rename(good / os.fsdecode(b"000_\xff.png"))
    engine = quiet_engine(tmp_path)
    engine.predict(model(visualizer=True), data_path=good, ckpt_path=small.checkpoint)
    table = next(tmp_path.glob("WTFlow/**/scores.csv"))
    names = [f"{good}/000_\\udcff.png", *(f"{good}/{k:03d}.png" for k in range(1, 10))]
    assert [row["image_path"] for row in csv.DictReader(table.read_text("utf-8").splitlines())] == names
    whole = json.loads(table.with_suffix(".json").read_text("utf-8"))
    assert whole["images"] == list(read(table))
    assert whole["summary"]["images"] == 10
    assert f"  {names[0]}\n" in capsys.readouterr().out
    (picture,) = table.parent.glob("images/good/000*")
    assert os.fsencode(picture.name) == b"000_\xff.png"
    assert "image_AUROC" in metrics_of(folder(copy), small, tmp_path)


def test_our_data_modules_read_folders_of_any_name(copy: Path, tmp_path: Path) -> None:
    """Products, the drawn parts, and the folders that `calibrate` and `diagnose` take."""
    for kind in ("test", "ground_truth"):
        (copy / kind / "scratch").rename(copy / kind / "Kratzer ü")
    plant = tmp_path / NAME
    shutil.copytree(copy, plant / "Größe")
    shutil.copytree(copy / "train" / "good", plant / "nur gute ö")
    trained = model(visualizer=True, false_alarm_rate=0.5)
    engine = quiet_engine(tmp_path / "results")
    data = Products(root=plant, num_workers=0, seed=0)
    (metrics,) = engine.train(trained, datamodule=data)
    assert {"image_AUROC", "pixel_AUROC"} <= set(metrics)
    rows = list(read(next((tmp_path / "results").rglob("scores.csv"))))
    assert {str(plant / "Größe" / "test" / "Kratzer ü" / "000.png")} <= {row["image_path"] for row in rows}
    assert list((tmp_path / "results").rglob("images/**/Größe/**/000.png"))
    assert data.members["Größe"].normal_dir == "train/good"
    test = data_sets(plant / "Größe").test
    assert str(plant / "Größe" / "test" / "Kratzer ü" / "001.png") in set(test.samples["image_path"])
    assert len(data_sets(plant / "nur gute ö").test) == 12
    parts = SyntheticParts(root=tmp_path / NAME / "drawn", train_images=2, test_images=2, defect_images=1, side=32)
    parts.setup()
    assert len(parts.train_data) == 2


def test_anomalibs_own_folders_must_be_of_ascii_names(copy: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    """A limit of anomalib: of `Folder` we say so; a prediction of a path fails before the model is asked."""
    root = copy.rename(tmp_path / NAME)
    with pytest.raises(ValueError, match=r"read no path with characters beyond ASCII, such as .* take --data Products"):
        fit(folder(root), tmp_path)
    engine = quiet_engine(tmp_path)
    with pytest.raises(ValueError, match="Path contains non-printable characters"):
        engine.predict(model(), data_path=root / "test" / "good", ckpt_path=small.checkpoint)
    link = tmp_path / "plain"
    link.symlink_to(root)
    batches = engine.predict(model(), data_path=link / "test" / "good", ckpt_path=small.checkpoint)
    assert [Path(path).parent for batch in batches for path in batch.image_path] == [root / "test" / "good"] * 10
    shutil.copy(link / "test/good/000.png", tmp_path / "good-ü.png")  # the names of files are free
    (tmp_path / "files").mkdir()
    (tmp_path / "good-ü.png").rename(tmp_path / "files" / "good-ü.png")
    assert len(engine.predict(model(), data_path=tmp_path / "files", ckpt_path=small.checkpoint)) == 1


def test_a_folder_that_is_not_there_is_named(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "test" / "scratch")
    sentence = f"There is nothing at '{copy}/test/scratch', where the data module looks for images: give it another"
    with pytest.raises(ValueError, match=sentence):
        fit(folder(copy), tmp_path)
    with pytest.raises(ValueError, match=sentence):
        data_sets(folder(copy))


@pytest.mark.parametrize("target", ["loop.png", "nowhere.png"])
@pytest.mark.parametrize("place", ["train/good", "test/good", "test/scratch"])
def test_links_that_lead_nowhere_are_named(copy: Path, tmp_path: Path, target: str, place: str) -> None:
    link = copy / place / "loop.png"
    link.symlink_to(target)
    sentence = f"The image '{link}' is a link that leads nowhere: remove it"
    with pytest.raises(ValueError, match=sentence):
        fit(folder(copy), tmp_path)
    with pytest.raises(ValueError, match=sentence):
        data_sets(copy)
    with pytest.raises(FileNotFoundError, match=f"File not found: {link}"):  # anomalib, before the model is asked
        PredictDataset(copy / place)


def test_links_to_folders_that_hold_themselves_are_not_followed(copy: Path, tmp_path: Path) -> None:
    (copy / "train" / "good" / "again").symlink_to(copy / "train" / "good")
    (copy / "train" / "good" / "folder.png").mkdir()
    data = folder(copy)
    fit(data, tmp_path)
    assert len(data.train_data) == 12


def test_linked_images_and_folders(copy: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copy)
    (copy / "test" / "good" / "linked.png").symlink_to(small.root / "test" / "good" / "000.png")
    data = folder(link, val_split_mode="same_as_test")
    metrics_of(data, small, tmp_path)
    rows = {Path(row["image_path"]).name: row for row in read(next((tmp_path / "results").rglob("scores.csv")))}
    assert rows["linked.png"]["raw_score"] == rows["000.png"]["raw_score"] or len(data.test_data) == 13


def test_nothing_is_written_beside_the_data(copy: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    """So data can be read-only; the whole of a training, a test and a prediction."""
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    trained, engine = model(), quiet_engine(tmp_path / "results")
    engine.train(trained, datamodule=folder(copy))
    engine.predict(trained, data_path=copy / "test" / "good")
    calibrate(small.checkpoint, copy / "test" / "good", tmp_path / "moved.ckpt")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


# What is said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "fewest"), [(20, 6), (200, 4), (1000, 4)])
def test_few_new_images_do_not_tell_whether_the_process_has_moved(old: int, fewest: int) -> None:
    """Even in the highest eighth of the old scores; the limit is where scipy's test begins to show that."""
    for new in range(1, 12):
        eighth = [old * 7 // 8 - 0.9 + 0.01 * k for k in range(new)]
        shows = mannwhitneyu(eighth, range(old)).pvalue < ALPHA
        assert could_tell(new, old, ALPHA) == shows == (new >= fewest)
    assert not could_tell(5, 0, ALPHA)


def test_calibrate_on_one_image_says_that_it_cannot_tell(copy: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    for path in sorted((copy / "test" / "good").iterdir())[1:]:
        path.unlink()
    said = str(calibrate(small.checkpoint, copy / "test" / "good", tmp_path / "moved.ckpt"))
    assert "1 image is too few to tell whether the process has moved (Mann-Whitney, p = " in said
    assert "score like" not in said


@pytest.fixture
def mixed(copy: Path) -> Path:
    """A folder of a folder of four images, and of what anomalib does not list, or nobody would."""
    root = copy / "test" / "good"
    (root / "sub").mkdir()
    for path in sorted(root.glob("*.png"))[:4]:
        path.rename(root / "sub" / path.name)
    for path in root.glob("*.png"):
        path.unlink()
    for name in ("part.jfif", "sub/part", "sub/part.gif", ".hidden.jfif", "sub/Thumbs.db", ".DS_Store"):
        shutil.copy(root / "sub" / "000.png", root / name)
    (root / "linked").symlink_to(copy / "train" / "good")
    return root


UNLISTED = "since anomalib knows images by their extensions, and follows no links to folders: "
EACH = (
    f"{UNLISTED}1 .gif ('sub/part.gif'), 1 .jfif ('part.jfif'), 1 link to a folder ('linked'), 1 without extension "
    "('sub/part')"
)


def said_of_files(command: Any, *args: Any, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")  # else Python gives the same one once
        command(*args, **kwargs)
    return [str(each.message).split(";")[0] for each in given if UNLISTED in str(each.message)]


def test_predict_names_the_files_that_it_does_not_judge(mixed: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    """Of the folder that it was given; of a data set, whose folder is not known, of the one that its images are in."""

    def said(**kwargs: Any) -> list[str]:
        engine = quiet_engine(tmp_path / "results")
        return said_of_files(engine.predict, model(), ckpt_path=small.checkpoint, **kwargs)

    sub = f"2 files in '{mixed / 'sub'}' not judged, {UNLISTED}1 .gif ('part.gif'), 1 without extension ('part')"
    everything = f"4 files in '{mixed}' not judged, {EACH}"
    assert said(data_path=mixed) == [everything]
    assert said(data_path=mixed / "sub") == said(dataset=PredictDataset(mixed)) == [sub]
    assert said(data_path=mixed / "sub" / "000.png") == said(dataset=PredictDataset(mixed / "sub" / "000.png")) == []
    some = PredictDataset(mixed)
    some.image_filenames = some.image_filenames[:3]
    assert said(dataset=some) == []
    assert said(data_path=mixed.parent / "scratch") == []


def test_images_that_a_limit_leaves_out_are_said(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small.root / "test" / "good"
    data = folder(small.root, val_split_mode="none", eval_batch_size=4)  # of 10 good ones and 2 scratched

    def said(batches: float) -> list[str]:
        engine = quiet_engine(tmp_path, limit_predict_batches=batches, limit_test_batches=batches)
        engine.predict(model(), data_path=good, ckpt_path=small.checkpoint)
        engine.test(model(), datamodule=data, ckpt_path=small.checkpoint, verbose=False)
        return [line for line in capsys.readouterr().out.splitlines() if "were judged" in line]

    rest = ": the others have no verdict."
    assert said(2) == [
        f"2 of 10 images were judged, since limit_predict_batches is 2{rest}",
        f"8 of 12 images were judged, since limit_test_batches is 2{rest}",
    ]
    assert said(1.0) == []
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert said(0) == []
    assert [str(each.message) for each in given if "was judged" in str(each.message)] == [
        f"No image was judged, since limit_{run}_batches is 0: there are no verdicts." for run in ("predict", "test")
    ]


def test_pictures_of_earlier_runs_among_the_images_are_counted(copy: Path, small: SimpleNamespace) -> None:
    """Where results lie in the folder of the images, of a prediction or of a test."""
    good, test = copy / "test" / "good", copy / "test"

    def said(data: Path) -> list[str]:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            quiet_engine(test).predict(model(visualizer=True), data_path=data, ckpt_path=small.checkpoint)
        return [str(each.message) for each in given if "images" in str(each.message)]

    assert said(good) == []
    quiet_engine(test).test(model(visualizer=True), datamodule=folder(copy), ckpt_path=small.checkpoint, verbose=False)
    tested = len(list((test / "WTFlow" / "parts").rglob("*.png")))
    assert tested == 6
    parts = len(list(test.glob("*/*.png")))
    assert said(test) == [
        f"{10 + tested} of the {parts + 10 + tested} images lie in '{test / 'WTFlow'}', where runs put their pictures, "
        "and were judged as if they were parts: move that folder out of the one that is judged, and run it again with "
        "another --default_root_dir."
    ]


@pytest.mark.parametrize("name", ["good", NAME])
def test_calibrate_and_diagnose_name_the_files_that_they_do_not_use(
    mixed: Path, small: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    folder = mixed.rename(mixed.parent / name)
    sentence = f"4 files in '{folder}' not used, {EACH}"
    assert said_of_files(calibrate, small.checkpoint, folder, tmp_path / "moved.ckpt") == [sentence]
    assert said_of_files(data_sets, folder) == [sentence]
    assert said_of_files(data_sets, folder / "sub" / "000.png") == []


def test_kinds_of_many_files_are_named_the_rarest_first(tmp_path: Path) -> None:
    """Notes beside images do not hide the one file that may show a part."""
    for place in range(7):
        (tmp_path / f"{place}.txt").touch()
        (tmp_path / f"0.{place}x").touch()
    (tmp_path / "z.JFIF").touch()
    words = r"^15 files .* not judged, .*: 1 \.0x \('0\.0x'\), .* 1 \.4x \('0\.4x'\) and 4 more; "
    with pytest.warns(UserWarning, match=words):
        warn_of_unlisted(tmp_path, [], "judged")
    listed = list(tmp_path.glob("0.?x"))
    with pytest.warns(UserWarning, match=r"^8 files .* not judged, .*: 1 \.jfif \('z\.JFIF'\), 7 \.txt \('0\.txt'\); "):
        warn_of_unlisted(tmp_path, listed, "judged")


def test_late_images_and_our_own_folder(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name in ("late.png", "results/a.png", "results/scores.csv"):
        (tmp_path / name).touch()
    words = (
        rf"^1 of the images in '{tmp_path}' not judged, since they came after it was listed: 'late.png'; run it again"
    )
    with pytest.warns(UserWarning, match=words) as given:
        warn_of_unlisted(tmp_path, [], "judged", tmp_path / "results")
    assert len(given) == 1


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python lists nothing in it, and says nothing; root may read all, hence the stand-in."""
    (tmp_path / "secret").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.warns(UserWarning, match=r": 1 folder that may not be read \('secret'\); "):
        warn_of_unlisted(tmp_path, [], "judged")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A checkpoint of a model of two drawn products, and a folder: ten good parts of the first, and what is none."""
    root, two_products = tmp_path_factory.mktemp("two"), ready(2)
    two_products.post_processor._image_threshold /= 1.6  # the field is not trained
    checkpoint = {"state_dict": two_products.state_dict(), "epoch": 0, "pytorch-lightning_version": "2"}
    two_products.on_save_checkpoint(checkpoint)
    torch.save({**checkpoint, "hyper_parameters": {"image_size": 64, "overrides": {"width": 8}}}, root / "model.ckpt")
    (root / "data" / "sub").mkdir(parents=True)
    pictures = {f"good{seed}.png": draw_part(seed, 64, None, 0)[0] for seed in range(40, 50)}
    pictures |= {f"sub/bad{seed}.png": np.roll(draw_part(seed, 64, None, 0)[0], 10, axis=1) for seed in range(50, 58)}
    pictures |= {f"other{seed}.png": draw_part(seed, 64, None, 1)[0] for seed in range(2)}
    pictures["stripes.png"] = np.tile(np.array([0, 255], np.uint8)[:, None, None], (32, 64, 3))
    pictures["white.png"] = np.full((64, 64, 3), 255, np.uint8)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(root / "data" / name)
    return SimpleNamespace(model=two_products, checkpoint=root / "model.ckpt", data=root / "data")


@torch.no_grad()
def test_calibrate_names_what_is_anomalous_at_the_old_threshold(two: SimpleNamespace, tmp_path: Path) -> None:
    """Defective parts and a stranger among good ones; of the other product there are too few."""
    post, high, low = two.model.post_processor, {}, {}
    for item in PredictDataset(two.data):
        raw = two.model.model(two.model.pre_processor.transform(item.image)[None])
        name, place = Path(item.image_path).relative_to(two.data).as_posix(), int(raw.product)
        score = math.inf if raw.strangeness > 1 else raw.pred_score.item()
        if place == 0 and score > post.image_threshold[0]:
            high[name] = score
        elif place == 1:
            low[name] = score
    done = calibrate(two.checkpoint, two.data, tmp_path / "moved.ckpt", false_alarm_rate=0.1)
    (one,) = done.products
    assert one.anomalous == pytest.approx(high, rel=1e-4)
    assert list(one.anomalous) == sorted(high, key=high.get, reverse=True)
    assert 6 < len(high) < one.images
    assert next(iter(one.anomalous)) == "stripes.png"
    assert done.left_out == pytest.approx(low, rel=1e-4)
    assert set(low) == {"white.png", "other0.png", "other1.png"}
    said = str(done)
    assert (
        f"{len(high)} of {one.images} images of '0' are anomalous at the old threshold, 'stripes.png' (like no" in said
    )
    assert f" and {len(high) - 5} more: leave those that are defective out and calibrate again." in said
    assert "too few images show '1': thresholds kept. Left out: 'white.png' (like no product), 'other" in said


def test_calibrate_on_strangers_names_them(two: SimpleNamespace, tmp_path: Path) -> None:
    """They count as anomalous at any threshold, so that of a few images there is none."""
    data = Path(shutil.copytree(two.data, tmp_path / "data"))
    shutil.rmtree(data / "sub")
    with pytest.raises(
        ValueError, match=r"Too many of the images .* 'stripes.png' \(like no product\), 'white.*: leave those out"
    ):
        calibrate(two.checkpoint, data, tmp_path / "moved.ckpt", false_alarm_rate=0.1)


@pytest.mark.parametrize(("sensitivity", "promised"), [(0.3, True), (0.5, True), (0.7, False)])
def test_another_sensitivity_moves_the_threshold_that_is_written_and_the_promise(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], sensitivity: float, promised: bool
) -> None:
    """A score is anomalous if it is above 1 - sensitivity, which in raw scores is T (1 - sensitivity) / sensitivity."""
    judged = WTFlow.load_from_checkpoint(small.checkpoint)
    judged.post_processor.image_sensitivity = sensitivity
    quiet_engine(tmp_path).test(judged, datamodule=folder(small.root, val_split_mode="same_as_test"), verbose=False)
    threshold = float(judged.post_processor.image_threshold) * (1 - sensitivity) / sensitivity
    for row in read(next(tmp_path.rglob("scores.csv"))):
        assert row["threshold"] == pytest.approx(threshold, rel=1e-6)
        assert (row["pred_label"] == "anomalous") == (row["raw_score"] > row["threshold"])
    out = capsys.readouterr().out
    assert f"above {1 - sensitivity:g} is anomalous" in out
    assert ("promised." in out) == promised


def test_a_sensitivity_that_is_given_to_a_trained_model_is_in_force(
    small: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """anomalib alone takes the checkpoint's 0.5, and parts that were to be anomalous are good."""
    given = model(post_processor=WTFlowPostProcessor(0.2, image_sensitivity=0.8))
    data = folder(small.root, val_split_mode="same_as_test")
    with caplog.at_level("INFO"):
        quiet_engine(tmp_path).test(given, datamodule=data, ckpt_path=small.checkpoint, verbose=False)
    said = "image_sensitivity=0.8, given here, is in force instead of the checkpoint's 0.5."
    assert [record.message for record in caplog.records].count(said) == 1
    limit = float(given.post_processor.image_threshold) * 0.2 / 0.8
    rows = list(read(next(tmp_path.rglob("scores.csv"))))
    assert [row["pred_label"] == "anomalous" for row in rows] == [row["raw_score"] > limit for row in rows]
    assert WTFlow.load_from_checkpoint(small.checkpoint).post_processor.image_sensitivity == 0.5


def test_training_with_a_high_sensitivity_promises_nothing(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    post = WTFlowPostProcessor(0.2, image_sensitivity=0.7)
    with caplog.at_level("INFO"):
        fit(folder(copy), tmp_path, post_processor=post)
    assert "image_sensitivity 0.7 calls some below it anomalous, so no rate is promised." in caplog.text
    assert post.promised_false_alarm_rate.isnan().all()
    assert post.effective_false_alarm_rate.item() == pytest.approx(1 / 6)


def test_the_limit_of_anomalibs_f1_threshold() -> None:
    """Its normalised scores are 0.5 at the threshold, and linear in raw ones."""
    post = WTFlowPostProcessor(None, image_sensitivity=0.7)
    for name, value in (("_image_threshold", 3.0), ("image_min", 1.0), ("image_max", 6.0)):
        getattr(post, name).fill_(value)
    limit = post.image_limit
    assert PostProcessor._normalize(limit, post.image_min, post.image_max, post.image_threshold).item() == (
        pytest.approx(1 - 0.7)
    )
    assert math.isclose(limit.item(), 2.0, rel_tol=1e-6)


SIZE = r"The export is for images of 96 x 96 pixels \(--input_size\), and the data has one of 64 x 64"


def test_images_of_another_size_than_a_graph_reads_are_refused() -> None:
    image = np.zeros((1, 3, 64, 64), np.float32)
    for shape, fits in (([-1, 3, -1, -1], True), ([1, 3, 64, 64], True), ([1, 3, 96, 96], False)):
        parameter = ov.opset13.parameter(shape, np.float32)
        graph = ov.Model([ov.opset13.relu(parameter)], [parameter])
        with nullcontext() if fits else pytest.raises(ValueError, match=SIZE):
            assert list(fitting(graph, [image])) == [image]


@pytest.mark.slow
def test_a_quantised_export_of_a_fixed_size_needs_images_of_that_size(small: SimpleNamespace, tmp_path: Path) -> None:
    exported = WTFlow.load_from_checkpoint(small.checkpoint).eval()
    with pytest.raises(ValueError, match=SIZE):
        exported.to_openvino(
            tmp_path, input_size=(96, 96), compression_type=CompressionType.INT8_PTQ, datamodule=folder(small.root)
        )


def test_anomalib_takes_a_path_of_ascii_characters_only() -> None:
    """The place of the refusal, should a newer anomalib mend it."""
    with pytest.raises(ValueError, match="non-printable"):
        validate_path("ä", should_exist=False)
