"""Diagnosis of a trained model, and of drawn data: numbers against anomalib's, the page against what it promises."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from drawn import scored
from PIL import Image

from anomalib_wtflow import SyntheticParts, diagnose, diagnose_toy
from anomalib_wtflow.cli.main import main
from anomalib_wtflow.diagnosis import progress
from anomalib_wtflow.diagnosis.flow_numbers import predicted_component
from anomalib_wtflow.diagnosis.progress import Progress
from anomalib_wtflow.diagnosis.scoring import informative_first, items
from anomalib_wtflow.diagnosis.without_flow import NAMES
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.operation.checkpoint import load_model
from anomalib_wtflow.operation.data import data_sets
from conftest import quiet_engine

FIGURES = ("radius", "centripetal", "field", "histograms")
FRONT = ("scores", "kinds")


def check_page(page: Path, figures: tuple[str, ...]) -> dict:
    """The page holds each figure, refers to nothing outside, and has two sentences for each; returns the numbers."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text
    assert text.count("data:image/png;base64,") == len(figures)
    for words in re.findall(r"<section>\s*<h2>.*?</h2>\s*<p>(.*?)</p>", text, re.DOTALL):
        assert len(re.findall(r"[.](?=\s|$)", words)) == 2, words
    for name in figures:
        with Image.open(page.parent / f"{name}.png") as picture:
            assert min(picture.size) > 200
    return json.loads((page.parent / "numbers.json").read_text())


# A trained model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("diagnosis")
    return diagnose(
        trained.checkpoint,
        trained.parts,
        output,
        flow_images=4,
        control_steps=5,
        log_density="hutchinson",
        device="cpu",
    )


@pytest.mark.slow
def test_scores_are_those_of_the_engine(page: Path, trained: SimpleNamespace) -> None:
    numbers = check_page(page, (*FRONT, *FIGURES, "log_density"))["scores"]
    engine = quiet_engine(trained.root)
    (metrics,) = engine.test(trained.model, datamodule=trained.parts)
    assert numbers["image_auroc"] == pytest.approx(metrics["image_AUROC"], abs=1e-5)
    assert numbers["pixel_auroc"] == pytest.approx(metrics["pixel_AUROC"], abs=1e-5)
    assert numbers["threshold"] == pytest.approx(float(trained.model.post_processor.image_threshold), rel=1e-5)
    items = [
        item for batch in engine.predict(trained.model, dataloaders=trained.parts.test_dataloader()) for item in batch
    ]
    wrong = [bool(item.pred_label) != bool(item.gt_label) for item in items]
    assert numbers["false_alarms"] + numbers["misses"] == sum(wrong)
    assert numbers["calibration_images"] == trained.model.post_processor.calibration_images.item()
    assert numbers["images"] == {
        "normal": sum(not item.gt_label for item in items),
        "anomalous": sum(map(bool, (item.gt_label for item in items))),
    }
    for level in ("image", "pixel"):
        for kind in ("normal", "anomalous"):
            assert sum(numbers[f"{level}_histogram"][kind]) == pytest.approx(1, abs=1e-4)


def test_predicted_component() -> None:
    assert predicted_component(ProbabilityPath("linear"), 0.5, 2.0) == pytest.approx(-1.25)
    angle = np.arcsin(0.1)
    speed = np.pi / 2 - angle
    expected = -speed * (np.tan(angle) + np.cos(angle) * 0.25)
    assert predicted_component(ProbabilityPath("variance_preserving", 0.1), 0.5, 2.0) == pytest.approx(expected)


@pytest.mark.slow
def test_flow_and_field_numbers(page: Path, trained: SimpleNamespace) -> None:
    """The flow starts at the features and ends where the score is taken; both fields are there."""
    numbers = json.loads((page.parent / "numbers.json").read_text())
    flow, model = numbers["flow"], trained.model.model
    channels = sum(model.channels)  # of a position that training couples with noise
    radius = flow["scored"]["normal"]["radius"]["median"][0]
    assert flow["predicted_start"] == {
        "worst_of_two": pytest.approx(predicted_component(model.path, (2 / np.pi / channels) ** 0.5, radius), rel=1e-5),
        "independent": pytest.approx(predicted_component(model.path, 0.0, radius), rel=1e-5),
    }
    good = [i for i in range(len(trained.parts.test_data)) if not trained.parts.test_data[i].gt_label]
    assert numbers["scores"]["images"]["normal"] == len(good)
    for kind in ("normal", "anomalous"):
        start = flow["scored"][kind]["radius"]["median"][0]
        assert start == pytest.approx(flow["ode"]["worst_of_two"][kind]["radius"]["median"][0], rel=1e-5)
        assert flow["positions"][kind] > 0
    assert flow["positions"]["normal"] == 4 * 8 * 8  # 128 px at stride 16
    assert set(numbers["field"]["couplings"]) == {"worst_of_two", "independent"}
    assert numbers["control_steps"] == 5
    assert set(numbers["scores"]["controls"]) == set(NAMES)
    assert numbers["training_steps"] == 3  # three epochs of one batch
    assert all(value > 0 for row in numbers["field"]["couplings"].values() for value in row["lipschitz"])
    proxy, _ = numbers["log_density"]["auroc"]
    assert proxy == pytest.approx(numbers["scores"]["image_auroc"], abs=1e-5)


@pytest.mark.slow
def test_images_without_labels(trained: SimpleNamespace, tmp_path: Path) -> None:
    trained.parts.prepare_data()
    page = diagnose(
        trained.checkpoint, Path(trained.parts.root) / "test" / "missing", tmp_path, flow_images=2, progress=False
    )
    numbers = check_page(page, (*FRONT, *FIGURES))
    assert numbers["scores"]["images"] == {"unlabelled": 4}
    assert numbers["scores"]["strongest_control"] is None
    assert numbers["scores"]["image_auroc"] is None
    assert set(numbers["flow"]["ode"]) == {"worst_of_two"}  # no good images to train plain rFM on


@pytest.mark.slow
def test_an_untrained_model_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=False)
    checkpoint["state_dict"]["model.normalization._fitted"] = torch.tensor([False])
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="is not trained: give a checkpoint written after training"):
        load_model(tmp_path / "model.ckpt")


def test_informative_first() -> None:
    """Wrong ones by distance from the threshold, each kind in turn, then right ones, the closest first."""
    images = [
        scored("scratch/found-surely", True, 9),
        scored("scratch/found-closely", True, 1.1),
        scored("good/passed", False, 0.9),
        scored("good/alarm-small", False, 1.2),
        scored("good/alarm-big", False, 3),
        scored("scratch/miss-near", True, 0.9),
        scored("scratch/miss-far", True, 0.2),
        scored("stain/miss", True, 0.8),
    ]
    names = [Path(image.path).name for image in informative_first(images, [1.0])]
    assert names == [
        *("miss-far", "miss", "alarm-big", "miss-near", "alarm-small"),
        *("found-closely", "passed", "found-surely"),
    ]
    unlabelled = [scored(f"{score}", None, score) for score in (0.5, 3, 1)]
    assert [image.score for image in informative_first(unlabelled, [1.0])] == [3, 1, 0.5]
    without = [scored(f"good/{score}", False, score, threshold=None) for score in (0.5, 3, 1)]
    assert [image.score for image in informative_first(without, [None])] == [3, 1, 0.5]


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(parts: SyntheticParts) -> Path:
    parts.prepare_data()
    return Path(parts.root)


def test_a_folder_in_mvtec_layout(folder: Path) -> None:
    train, test = data_sets(folder)
    assert len(train) == 16
    assert len(test) == 20 + 3 * 4
    defective = [test[i] for i in range(len(test)) if test[i].gt_label]
    assert len(defective) == 12
    assert all(item.gt_mask.any() for item in defective)


def test_a_folder_of_images(folder: Path) -> None:
    train, test = data_sets(folder / "test" / "good")
    assert train is None
    assert isinstance(test, PredictDataset)
    assert len(test) == 20


@pytest.mark.parametrize("below", [False, True])
def test_a_data_config(folder: Path, tmp_path: Path, below: bool) -> None:
    lines = [
        "class_path: Folder",
        "init_args:",
        f"  {{name: mine, root: '{folder}', normal_dir: train/good, normal_test_dir: test/good,",
        "  abnormal_dir: test/stain}",
    ]
    text = "\n".join(["data:", *(f"  {line}" for line in lines)] if below else lines)
    (tmp_path / "data.yaml").write_text(text)
    train, test = data_sets(tmp_path / "data.yaml")
    assert len(train) == 16
    assert len(test) < 20 + 4  # Folder keeps half of it for validation


def test_data_modules_are_used_as_they_are(parts: SyntheticParts) -> None:
    assert len(data_sets(parts).train) == 16


def test_bad_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no data at 'nowhere': give a folder"):
        data_sets("nowhere")
    (tmp_path / "x.yaml").write_text("model: WTFlow")
    with pytest.raises(ValueError, match="holds no data config: give 'class_path' and 'init_args'"):
        data_sets(tmp_path / "x.yaml")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"There are no images in '.*text': give a folder of images"):
        data_sets(tmp_path / "text")
    (tmp_path / "half" / "test").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no training images: put good images into"):
        data_sets(tmp_path / "half")


# The command ---------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", *map(str, arguments)])
    assert stop.value.code not in (0, None)
    return f"{capsys.readouterr().err}{stop.value.code}"


def test_errors_are_one_sentence(
    capsys: pytest.CaptureFixture[str], trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "give --ckpt_path and --data, or --toy" in run(capsys)
    message = run(capsys, "--ckpt_path", "none.ckpt", "--data", tmp_path)
    assert message.startswith("error: There is no checkpoint at 'none.ckpt': give the model.ckpt that 'anomalib train")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    message = run(capsys, "--ckpt_path", tmp_path / "text.ckpt", "--data", tmp_path)
    assert message.startswith(f"error: '{tmp_path / 'text.ckpt'}' is not a checkpoint of a WTFlow model: give")
    assert "\n" not in message
    assert "seeds is 0: train with at least 1 seed" in run(capsys, "--toy", "--seeds", 0)
    assert "flow_images is 0 and control_steps 0" in run(
        capsys, "--ckpt_path", "x", "--data", tmp_path, "--flow_images", 0
    )
    message = run(capsys, "--ckpt_path", "x", "--data", "SyntheticParts", "--data.side", 10)
    assert message.startswith("error: SyntheticParts was asked for 64, 40 and 16 images of 10 pixels: draw at least")
    assert "is required but not" in run(capsys, "--ckpt_path", "x", "--data", "Folder")
    for nothing in ("nowhere", "no/where", "nowhere.yaml", "Foldr"):
        message = run(capsys, "--ckpt_path", trained.checkpoint, "--data", nothing)
        assert message.startswith(f"error: There is no data at '{nothing}': give a folder, a YAML file, or the name of")
        assert "\n" not in message
    assert "json.Nonsense" in run(capsys, "--ckpt_path", "x", "--data", "json.Nonsense")
    assert "hutchinson" in run(capsys, "--ckpt_path", "x", "--data", tmp_path, "--log_density", "exakt")


def test_errors_of_others_are_not_reduced_to_a_sentence(
    trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a data module of the user's: the traceback says where it is."""
    error = ValueError("of my own")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SyntheticParts, "setup", fail)
    with pytest.raises(ValueError, match="of my own") as raised:
        main(["diagnose", "--ckpt_path", str(trained.checkpoint), "--data", "SyntheticParts"])
    assert raised.value is error


@pytest.mark.slow
def test_the_command_on_a_data_module(trained: SimpleNamespace, tmp_path: Path) -> None:
    """As a user types it: anomalib's name of the data and its arguments; nothing but the result on the terminal."""
    trained.parts.prepare_data()
    data = [
        "--data",
        "Folder",
        "--data.name",
        "mine",
        "--data.root",
        trained.parts.root,
        "--data.normal_dir",
        "train/good",
    ]
    data += ["--data.normal_test_dir", "test/good", "--data.abnormal_dir", "test/missing"]
    command = [Path(sys.executable).parent / "anomalib-wtflow", "diagnose", "--ckpt_path", trained.checkpoint, *data]
    command += ["--flow_images", 2, "--control_steps", 0, "--output", tmp_path / "page"]
    result = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(f"Wrote {tmp_path / 'page' / 'index.html'}")
    assert "Warning" not in result.stderr
    assert "Traceback" not in result.stderr
    check_page(tmp_path / "page" / "index.html", (*FRONT, *FIGURES))


@pytest.mark.slow
def test_toy(tmp_path: Path) -> None:
    page = diagnose_toy(tmp_path, seeds=1, progress=False)
    numbers = check_page(page, ("trajectories", "well_and_escape", "centripetal", "lipschitz", "trivial_field"))
    assert numbers["well_and_escape"]["subspace"]["independent"]["auroc"][0] > 0.88
    assert numbers["lipschitz"]["finite data, independent"]["exponent"] == pytest.approx(-1, abs=0.05)


def test_output_that_is_a_file(tmp_path: Path) -> None:
    from anomalib_wtflow.diagnosis.report import write_report

    (tmp_path / "page").write_text("")
    sentence = r"^The diagnosis cannot be written to .*page \(File exists\): .* folder as --output\.$"
    with pytest.raises(RuntimeError, match=sentence):
        write_report(tmp_path / "page", "t", "s", [], {})
    with pytest.raises(ValueError, match="Out of range float"):
        write_report(tmp_path / "new", "t", "s", [], {"x": float("nan")})
    assert not (tmp_path / "new").exists()


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(
        ValueError, match=r"The image '.*b.png' cannot be read: remove it or replace it by a whole file"
    ):
        list(items(data_sets(tmp_path).test, range(2)))


def test_text_is_escaped(tmp_path: Path) -> None:
    from anomalib_wtflow.diagnosis.report import write_report

    text = write_report(tmp_path, "<b>", "1 < 2 & {x}", [], {"settings": {"a": "<i>"}}).read_text()
    assert "<b>" not in text
    assert "1 &lt; 2 &amp; {x}" in text
    assert "&lt;i&gt;" in text


def test_names_that_are_no_utf8_are_shown(tmp_path: Path) -> None:
    from anomalib_wtflow.diagnosis.report import write_report

    name = os.fsdecode(b"x_\xff.png")
    page = write_report(tmp_path, "t", "s", [], {"image": name}, front=f"<p>{name}</p>")
    assert r"<p>x_\udcff.png</p>" in page.read_text("utf-8")
    assert json.loads((tmp_path / "numbers.json").read_text("utf-8")) == {"image": name}


def test_headless() -> None:
    """Drawing needs neither a display nor pyplot."""
    code = "import sys, anomalib_wtflow.diagnosis.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_lines_where_there_is_no_terminal(
    wanted: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each stage, and one at most every five seconds: here each item takes three."""
    now = itertools.count(step=3)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(Progress(wanted)(range(6), "Scoring", 6)) == list(range(6))
    captured = capsys.readouterr()
    assert captured.err == ("Scoring (6)\nScoring: 2 of 6\nScoring: 4 of 6\n" if wanted else "")
    assert captured.out == ""


def test_bars_where_standard_error_is_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever standard output is: the result may go to a file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(Progress(True)([1, 2], "Scoring", 2)) == [1, 2]
    captured = capsys.readouterr()
    assert "\x1b[" in captured.err
    assert captured.out == ""
