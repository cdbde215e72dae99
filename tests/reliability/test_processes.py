"""Processes: two that train together, and one that is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import anomalib_wtflow
from anomalib_wtflow import Products, SyntheticParts, WTFlow
from conftest import quiet_engine

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]
SOURCE = Path(anomalib_wtflow.__file__).parents[1]
TWO = {"strategy": "ddp", "devices": 2}


def environment() -> dict[str, str]:
    """One thread, and nothing of another distributed run."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")}
    paths = os.pathsep.join(map(str, (SOURCE, TESTS, Path(__file__).parent)))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def train_here(root: Path, parts: Path, **engine: Any) -> None:
    """Train and test in this process, and in those that Lightning starts; keep what each has."""
    sizes = {"train_images": 9, "defect_images": 2, "side": 64}
    members = {f"part {k}": SyntheticParts(parts, test_images=7 + k, product=k, **sizes) for k in range(2)}
    data = Products(members=members, train_batch_size=4, num_workers=0)
    model = WTFlow(max_epochs=6, image_size=64, false_alarm_rate=0.3, visualizer=False)
    extract, passed = model.model.extract, []
    model.model.extract = lambda images: (passed.append(len(images)), extract(images))[1]
    runner = quiet_engine(root, accelerator="cpu", **engine)
    runner.fit(model, datamodule=data)
    # The validation's images pass the whole model.
    collected = sum(passed) - sum(len(batch) for batch in runner.trainer.val_dataloaders)
    state = {k: v.clone() for k, v in model.state_dict().items() if "feature_extractor" not in k}
    (metrics,) = runner.test(model, datamodule=data, verbose=False)
    rank = runner.trainer.global_rank
    torch.save({"state": state, "marks": model.marks}, root / f"state-{rank}.pt")
    (root / f"numbers-{rank}.json").write_text(json.dumps({"collected": collected, "metrics": metrics}))


PROGRAM = """
import sys
from pathlib import Path
from test_processes import TWO, train_here

if __name__ == "__main__":
    train_here(Path(sys.argv[1]), Path(sys.argv[2]), **TWO)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same training and test by one process and by two; the 18 images are 4, 4 and 1 of each of two."""
    parts, one, two = (tmp_path_factory.mktemp(name) for name in ("parts", "one", "two"))
    train_here(one, parts, devices=1)
    (two / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(two), str(parts)]
    done = subprocess.run(command, cwd=two, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = (one / "{}-0", two / "{}-0", two / "{}-1")
    states = [torch.load(f"{str(file).format('state')}.pt") for file in files]
    numbers = [json.loads(Path(f"{str(file).format('numbers')}.json").read_text()) for file in files]
    return SimpleNamespace(states=states, numbers=numbers)


def test_two_processes_learn_what_one_does(both: SimpleNamespace) -> None:
    """Statistics, thresholds and weights: equal in both, and up to rounding equal to one process's."""
    one, first, second = (each["state"] for each in both.states)
    assert one.keys() == first.keys() == second.keys()
    for name in one:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
    for kind in ("training", "calibration"):
        assert all(torch.equal(each["marks"][kind], both.states[0]["marks"][kind]) for each in both.states)


def test_each_image_passes_the_backbone_once_in_both(both: SimpleNamespace) -> None:
    alone, *parts = (each["collected"] for each in both.numbers)
    assert alone == 18
    assert parts == [9, 9]


def test_two_processes_measure_what_one_does(both: SimpleNamespace) -> None:
    one, first, second = (each["metrics"] for each in both.numbers)
    for name in ("image_AUROC", "pixel_AUROC"):
        assert first[name] == pytest.approx(one[name], abs=2e-2)
        assert second[name] == first[name]


# Killed ---------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.flow.regression import FieldTraining
from conftest import quiet_engine

folder, moment = Path(sys.argv[1]), sys.argv[2]


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def save(value, file, *args, save=torch.save, **kwargs):
    save(value, file, *args, **kwargs)
    kill()


if moment == "fit":
    FieldTraining.epoch = kill
if moment == "checkpoint":
    torch.save = save
data = SyntheticParts(folder / "data", train_images=8, test_images=6, defect_images=1, side=64)
model = WTFlow(max_epochs=2, image_size=64, false_alarm_rate=0.3, visualizer=False)
quiet_engine(folder / "results").fit(model, datamodule=data)
"""


@pytest.mark.parametrize("moment", ["fit", "checkpoint"])
def test_a_killed_training_leaves_no_checkpoint_and_the_same_command_works(tmp_path: Path, moment: str) -> None:
    """Also where it is killed while the checkpoint is written: it is renamed when it is whole."""
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    ends = [
        subprocess.run(
            [sys.executable, str(program), str(tmp_path), each], env=environment(), capture_output=True, check=False
        )
        for each in (moment, "none")
    ]
    assert [each.returncode for each in ends] == [-signal.SIGKILL, 0], ends[1].stderr[-2000:]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert "v1" in checkpoint.parts
    assert WTFlow.load_from_checkpoint(checkpoint).model.fitted
