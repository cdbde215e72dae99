"""The command line, as a user types it, in new processes; and every config."""

import os
import re
import shutil
import subprocess
import sys
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

import anomalib_wtflow
from anomalib_wtflow import SyntheticParts, WTFlow, calibrate, diagnose
from anomalib_wtflow.cli.main import main
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.settings import ARGUMENTS, declared, get_settings, option

CONFIGS = Path(__file__).parents[2] / "configs"
ANOMALIB = shutil.which("anomalib", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


class ParseOnly(AnomalibCLI):
    """anomalib's command line up to the point where it builds what it has parsed."""

    def instantiate_classes(self) -> None:
        pass


def anomalib(*arguments: object, cwd: Path, fails: bool = False) -> str:
    command = [ANOMALIB, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    output = result.stdout + result.stderr
    assert bool(result.returncode) == fails, output[-4000:]
    return output


@pytest.mark.parametrize("name", ["quickstart", "wtflow", "wtflow_paper", "mvtec"])
def test_configs_parse(name: str) -> None:
    arguments = ["train", "--config", str(CONFIGS / f"{name}.yaml")]
    if name == "wtflow":
        arguments += ["--data", "Folder", "--data.name", "parts", "--data.normal_dir", "good"]
    config = ParseOnly(arguments, run=False).config.train
    assert config.model.class_path == "anomalib_wtflow.WTFlow"
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"].get("init_args", {})
    assert {key: config.model.init_args[key] for key in given} == given


def test_the_commented_config_is_the_defaults() -> None:
    given = yaml.safe_load((CONFIGS / "wtflow.yaml").read_text())["model"]["init_args"]
    assert given.pop("recipe") == "default"
    overrides = given.pop("overrides")
    assert not set(overrides) & set(ARGUMENTS)
    assert {**given, **overrides} == get_settings().plain()


def test_the_paper_config_is_the_paper_recipe() -> None:
    given = yaml.safe_load((CONFIGS / "wtflow_paper.yaml").read_text())["model"]["init_args"]
    assert given == {"recipe": "paper"}


def test_the_list_of_settings_is_that_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["settings", "--markdown"])
    printed = capsys.readouterr().out
    assert printed.strip() in (CONFIGS.parent / "docs" / "settings.md").read_text()
    assert len(printed.splitlines()) == 2 + len(declared())
    main(["settings"])
    shown = capsys.readouterr().out
    for name in declared():
        assert option(name) in shown


def test_benchmark_config() -> None:
    """Each row has the same arguments (or anomalib cannot collect them), and each model exists."""
    from anomalib.data import get_datamodule
    from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

    config = yaml.safe_load((CONFIGS / "benchmark.yaml").read_text())
    rows = list(get_iterator_from_grid_dict(config["benchmark"]))
    names = [row["model"]["class_path"] for row in rows]
    assert [name.rsplit(".")[-1] for name in names] == ["WTFlow", "Patchcore", "FastflowBaseline", "Padim"]
    assert len({tuple(row["model"]["init_args"]) for row in rows}) == 1
    assert type(get_datamodule(rows[0]["data"])) is SyntheticParts


def test_a_wrong_name_lists_the_valid_ones() -> None:
    arguments = ["train", "--model", "WTFlow", "--model.overrides.coupling", "nearest", "--data", "SyntheticParts"]
    given = ParseOnly(arguments, run=False).config.train.model.init_args
    with pytest.raises(WTFlowError, match=r"Unknown coupling 'nearest': .*choose one of .*antipodal"):
        WTFlow(overrides=given.overrides)


@pytest.mark.slow
def test_a_wrong_argument_is_named(tmp_path: Path) -> None:
    output = anomalib(
        "train",
        "--model",
        "WTFlow",
        "--model.backbone",
        "resnt18",
        "--data",
        "SyntheticParts",
        cwd=tmp_path,
        fails=True,
    )
    assert "Unknown backbone 'resnt18': did you mean resnet18" in " ".join(output.split())


@pytest.mark.slow
def test_train_test_predict_export(parts: SyntheticParts, tmp_path: Path) -> None:
    parts.prepare_data()
    root = Path(parts.root)
    data = ["--data", "Folder", "--data.root", root, "--data.name", "mine", "--data.normal_dir", "train/good"]
    data += ["--data.normal_test_dir", "test/good", "--data.abnormal_dir", "test/missing", "--data.num_workers", 0]
    data += ["--data.train_batch_size", 2, "--data.seed", 0]
    data += ["--data.mask_dir", "ground_truth/missing"]
    options = ["--model.max_epochs", 30, "--model.image_size", 128, "--model.overrides.plateau", 0]
    output = anomalib("train", "--model", "WTFlow", *data, *options, cwd=tmp_path)
    assert float(re.search(r"image_AUROC\W+([\d.]+)", output)[1]) > 0.95
    results = tmp_path / "results/WTFlow/mine/latest"
    assert list((results / "images").rglob("*.png"))

    checkpoint = results / "weights/lightning/model.ckpt"
    common = ["--model", "WTFlow", "--model.image_size", 128, "--ckpt_path", checkpoint]
    again = anomalib("test", *common, *data, cwd=tmp_path)
    assert re.search(r"image_AUROC\W+([\d.]+)", again)[1] == re.search(r"image_AUROC\W+([\d.]+)", output)[1]
    anomalib("predict", *common, "--data", root / "test/missing", cwd=tmp_path)
    for kind, file in [("torch", "model.pt"), ("onnx", "model.onnx"), ("openvino", "model.xml")]:
        anomalib("export", "--export_type", kind, *common, "--export_root", tmp_path / "out", cwd=tmp_path)
        assert (tmp_path / "out/weights" / kind / file).stat().st_size > 1000

    refused = anomalib("predict", "--model", "WTFlow", "--data", root / "test/good", cwd=tmp_path, fails=True)
    assert "not trained" in refused


@pytest.mark.slow
def test_benchmark_runs(tmp_path: Path) -> None:
    """The config that is shipped, with fewer and smaller images."""
    config = yaml.safe_load((CONFIGS / "benchmark.yaml").read_text())
    config["benchmark"]["data"]["init_args"] = {
        "train_images": 8, "test_images": 8, "defect_images": 2, "side": 128, "root": str(tmp_path / "data"),
    }  # fmt: skip
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    import pandas as pd

    anomalib("benchmark", "--config", "benchmark.yaml", cwd=tmp_path)
    (table,) = tmp_path.glob("runs/benchmark/*/results.csv")
    results = pd.read_csv(table)
    assert len(results) == 4
    assert results["image_AUROC"].between(0, 1).all()
    assert results.set_index(results["model.class_path"].str.rsplit(".").str[-1]).loc["WTFlow", "image_AUROC"] > 0.9


# The plugin's own command ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibrate(tmp_path: Path, small: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints is what the function returns; the old checkpoint stays, and an image may have any name."""
    good = tmp_path / "good"
    shutil.copytree(small.root / "test" / "good", good)
    shutil.copy(good / "000.png", os.fsencode(good) + b"/copy-\xff.png")
    main(["calibrate", f"--ckpt_path={small.checkpoint}", f"--data={good}", f"--output={tmp_path / 'first.ckpt'}"])
    printed = capsys.readouterr().out
    done = calibrate(small.checkpoint, good, tmp_path / "second.ckpt")
    shown = str(done).replace("second.ckpt", "first.ckpt").encode(errors="backslashreplace").decode()
    assert printed == f"{shown}\n"
    assert re.search(r"^Left out 1, since they are copies of others: '(000|copy-.*)\.png'\.$", printed, re.M)
    assert "10 good images support a false-alarm rate of at most 18.18%." in printed
    with pytest.raises(WTFlowError, match=r"^false_alarm_rate is 2"):
        main(["calibrate", f"--ckpt_path={small.checkpoint}", f"--data={good}", "--false_alarm_rate=2"])


def test_diagnose_takes_folders_files_and_data_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    @wraps(diagnose)
    def recorded(**kwargs: Any) -> Path:
        given.append(kwargs)
        return Path("index.html")

    monkeypatch.setattr(anomalib_wtflow, "diagnose", recorded, raising=False)
    for data in (["--data=plant"], ["--data=SyntheticParts", f"--data.root={tmp_path}", "--data.side=64"]):
        main(["diagnose", "--ckpt_path=model.ckpt", "--control=true", *data])
    (folder, module) = (each.pop("data") for each in given)
    assert folder == "plant"
    assert (type(module), module.side) == (SyntheticParts, 64)
    assert given[0] == given[1]
    assert (given[0]["ckpt_path"], given[0]["control"], given[0]["flow_images"]) == ("model.ckpt", True, 8)
