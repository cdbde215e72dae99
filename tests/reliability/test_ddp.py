"""More than one process, and more than one machine: Lightning's DDP on CPU, as the command line starts it."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import PredictDataset
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import anomalib_wtflow
from anomalib_wtflow import Products, SyntheticParts, WTFlow
from anomalib_wtflow.features.cache import FeatureStore
from anomalib_wtflow.training.plateau import Plateau
from anomalib_wtflow.training.processes import without_repeats
from conftest import callback_of, quiet_engine

TESTS = Path(__file__).parents[1]
SOURCE = Path(anomalib_wtflow.__file__).parents[1]
TWO = {"strategy": "ddp", "devices": 2}


def environment(folder: Path, **more: str) -> dict[str, str]:
    """One thread, a folder of its own for temporary files, and nothing of another distributed run."""
    (folder / "temporary").mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")}
    paths = os.pathsep.join(map(str, (SOURCE, TESTS, Path(__file__).parent)))
    own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary"), "PYTHONPATH": paths, "COLUMNS": "200"}
    return {**kept, **own, **more}


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a file of verdicts by image; none is there twice."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["image_path"] for row in rows}) == len(rows)
    return {row["image_path"]: row for row in rows}


# The sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 2), (8, 3), (10, 4), (2, 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_processes_together_show_each_image_once(count: int, size: int, batched: bool) -> None:
    def loader(rank: int) -> DataLoader:
        sampler = DistributedSampler(range(count), size, rank, shuffle=False)  # type: ignore[arg-type]
        how: dict[str, Any] = {"batch_sampler": BatchSampler(sampler, 2, False)} if batched else {"sampler": sampler}
        return DataLoader(range(count), **how)  # type: ignore[arg-type]

    repeated = [int(index) for rank in range(size) for batch in loader(rank) for index in batch]
    assert len(repeated) == -(-count // size) * size
    shown = [int(index) for rank in range(size) for batch in without_repeats(loader(rank)) for index in batch]
    assert sorted(shown) == list(range(count))


def test_fewer_images_than_processes_are_repeated() -> None:
    loaders = [DataLoader([0], sampler=DistributedSampler([0], 2, rank, shuffle=False)) for rank in (0, 1)]  # type: ignore[arg-type, list-item]
    assert [len(without_repeats(loader)) for loader in loaders] == [1, 1]


# The same as one process ----------------------------------------------------------------------------------------------


def train_here(root: Path, parts: Path, **engine: Any) -> None:
    """Train, test and predict in this process, with the same draws for each image, and save what came of it."""
    members = {
        name: SyntheticParts(parts, train_images=8, test_images=7 + 2 * k, defect_images=2, side=64, product=k)
        for k, name in enumerate(("flange", "disc"))
    }
    data = Products(members=members, train_batch_size=16 // engine.get("devices", 1), num_workers=0)
    model = WTFlow(max_epochs=24, image_size=64, false_alarm_rate=0.3, overrides={"plateau": 0.9})
    regress, extract, passed = model.model.regress, model.model.extract, []

    def alike(x0: torch.Tensor, _: Any = None, *, product: Any = None, averaged: bool = False) -> Any:
        """Each image's times, noise and positions depend on the step alone, not on the process."""
        seed = 999 if averaged else model.trainer.global_step
        each = [
            regress(x0[k : k + 1], torch.Generator().manual_seed(seed), product=product[k : k + 1], averaged=averaged)
            for k in range(len(x0))
        ]
        return tuple(torch.cat(values) for values in zip(*each, strict=True))

    model.model.regress = alike  # type: ignore[method-assign]
    model.model.extract = lambda x: (passed.append(len(x)), extract(x))[1]  # type: ignore[method-assign, func-returns-value]
    runner = quiet_engine(root, accelerator="cpu", **engine)
    runner.fit(model, datamodule=data)
    losses, extracted = callback_of(model, Plateau).losses, sum(passed)
    rank = runner.trainer.global_rank
    state = {k: v.clone() for k, v in model.state_dict().items() if "feature_extractor" not in k}
    folder = Path(runner.trainer.default_root_dir)
    metrics = runner.test(model, datamodule=data, verbose=False)
    if rank == 0:
        (folder / "scores.csv").rename(root / "tested.csv")
    images = PredictDataset(path=members["flange"].root / "test" / "good")  # 7 of them
    runner.predict(model, dataloaders=DataLoader(images, collate_fn=images.collate_fn, batch_size=2))
    if rank == 0:
        (folder / "scores.csv").rename(root / "predicted.csv")
    numbers = {"losses": losses, "extracted": extracted, "metrics": metrics[0], "folder": str(folder)}
    torch.save(state, root / f"state-{rank}.pt")
    (root / f"numbers-{rank}.json").write_text(json.dumps(numbers))


PROGRAM = """
import sys
from pathlib import Path
from test_ddp import TWO, train_here

if __name__ == "__main__":
    train_here(Path(sys.argv[1]), Path(sys.argv[2]), **TWO)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same training, test and prediction by one process and by two, with equal draws and global batches."""
    parts, one, two = (tmp_path_factory.mktemp(name) for name in ("parts", "one", "two"))
    train_here(one, parts, devices=1)
    (two / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", str(two), str(parts)]
    done = subprocess.run(command, cwd=two, env=environment(two), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(path) for path in (one / "state-0.pt", two / "state-0.pt", two / "state-1.pt")]
    numbers = [
        json.loads(path.read_text())
        for path in (one / "numbers-0.json", two / "numbers-0.json", two / "numbers-1.json")
    ]
    return SimpleNamespace(one=one, two=two, states=states, numbers=numbers, said=done.stdout + done.stderr)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(both: SimpleNamespace) -> None:
    """Whitening, centroids, limits, slopes, thresholds and weights: equal in both, and equal to one process's.

    The draws and the global batch being equal, what is left is the order in which float32 numbers are added up.
    """
    one, first, second = both.states
    assert one.keys() == first.keys() == second.keys()
    for name in one:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    fitted = ("recognition.centroids", "recognition.limit", "normalization.mean", "normalization.weight")
    for name in fitted:  # from float64 sums, before any step
        torch.testing.assert_close(first[f"model.{name}"], one[f"model.{name}"], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_stop_when_one_does(both: SimpleNamespace) -> None:
    one, first, second = (each["losses"] for each in both.numbers)
    assert len(one) == 20  # of 24: the first epoch that may be the last
    assert first == second
    assert first == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_two_processes_extract_each_image_once(both: SimpleNamespace) -> None:
    alone, *parts = (each["extracted"] for each in both.numbers)
    assert alone == 16 + 13  # to train on, and for validation and the threshold
    assert sum(parts) == alone
    assert min(parts) > 0
    assert not list((both.two / "temporary").glob("wtflow-features-*"))


@pytest.mark.slow
def test_two_processes_test_and_predict_each_image_once(both: SimpleNamespace) -> None:
    """Metrics and rows are those of one process, though the number of images does not divide by two."""
    one, first, second = (each["metrics"] for each in both.numbers)
    assert first == pytest.approx(one, abs=1e-5)
    assert second == {name: value for name, value in first.items() if not name.startswith("products_")}
    for name, count in (("tested", 15), ("predicted", 7)):
        alone, together = (rows_of(root / f"{name}.csv") for root in (both.one, both.two))
        assert len(alone) == count
        assert together.keys() == alone.keys()
        for path, row in alone.items():
            assert together[path]["pred_label"] == row["pred_label"]
            assert float(together[path]["pred_score"]) == pytest.approx(float(row["pred_score"]), rel=1e-4)
    assert both.numbers[1]["folder"] == both.numbers[2]["folder"]
    for numbers in both.numbers:
        summary = json.loads((Path(numbers["folder"]) / "scores.json").read_text())["summary"]
        assert (summary["images"], summary["given"]) == (7, 7)
    assert both.said.count("15 images: ") == both.said.count("7 images: ") == both.said.count("Stopped after 20") == 1
    assert "sync_dist=True" not in both.said  # Lightning's advice, of the products' metrics


# The commands ---------------------------------------------------------------------------------------------------------

COMMAND = "import sys; from anomalib.cli.cli import main; sys.exit(main())"
NODES = ("--trainer.num_nodes", "2", "--trainer.devices", "1")


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_command_trains_in_two_processes(nodes: int, tmp_path: Path) -> None:
    """On one machine Lightning starts the second process; on two, each has its command, here both on this one."""
    port = str(free_port())
    program = tmp_path / "command.py"
    program.write_text(COMMAND)  # Lightning starts the others by the program's name
    arguments = [sys.executable, str(program), "train", "--model", "WTFlow", "--model.image_size", "64"]
    arguments += ["--model.max_epochs", "2", "--model.false_alarm_rate", "0.3", "--data", "SyntheticParts"]
    sizes = {"train_images": 8, "test_images": 7, "defect_images": 2, "side": 64}
    settings = {"root": tmp_path / "parts", "train_batch_size": 4, **sizes}
    arguments += [word for name, value in settings.items() for word in (f"--data.{name}", str(value))]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    arguments += NODES if nodes == 2 else ("--trainer.devices", "2")
    SyntheticParts(tmp_path / "parts", **sizes).prepare_data()
    logs = [tmp_path / f"{node}.log" for node in range(nodes)]
    started = []
    for node, log in enumerate(logs):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(node)} if nodes == 2 else {}
        machine = tmp_path / str(node)  # anomalib's versions of a folder race where two machines share one
        machine.mkdir()
        with log.open("w") as file:
            given = environment(tmp_path, **where)
            started.append(subprocess.Popen(arguments, cwd=machine, env=given, stdout=file, stderr=subprocess.STDOUT))
    assert [process.wait(timeout=300) for process in started] == [0] * nodes, logs[0].read_text()[-3000:]

    root = tmp_path / "0" / "results" / "WTFlow" / "SyntheticParts"
    versions = [path for path in root.iterdir() if not path.is_symlink()]
    assert [path.resolve() for path in (root / "latest", *versions)] == [versions[0].resolve()] * 2
    assert (versions[0] / "weights" / "lightning" / "model.ckpt").is_file()
    rows = rows_of(versions[0] / "scores.csv")
    assert len(rows) == 7
    assert {Path(path).name for path in rows} <= {path.name for path in (versions[0] / "images").rglob("*.png")}
    assert len(list((versions[0] / "images").rglob("*.png"))) == 7
    assert not list(versions[0].glob("scores-*"))
    said = "".join(log.read_text() for log in logs)
    for once in ("7 images: ", "normal images that were not trained on", "The feature cache takes", "image_AUROC"):
        assert said.count(once) == 1, once
    assert len(re.findall("Initializing distributed: GLOBAL_RANK", said)) == 2


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


# Growth ---------------------------------------------------------------------------------------------------------------


def test_features_go_to_a_file_where_the_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is the user's; half of what the machine has left is the most that is taken of it."""
    size = 4 * 2 * 5
    for available, in_memory in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr("anomalib_wtflow.features.cache.available_memory", lambda: available)  # noqa: B023
        store = FeatureStore(2, 1e9)
        store.append(torch.randn(2, 5))
        assert store.in_memory == in_memory
