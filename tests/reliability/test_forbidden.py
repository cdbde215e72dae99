"""Files and folders that a user may not read or write: a sentence names them, or they are not needed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import checkpoint, obey_permissions, run, runs, training

from anomalib_wtflow import SyntheticParts

pytestmark = pytest.mark.slow
WAY = "cannot be used (Permission denied): see to that, or give another place."


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    """The drawn images that ``training`` finds below ``data``; all may be read again at the end."""
    parts = SyntheticParts(tmp_path / "data", 16, 8, 4, 64)
    parts.prepare_data()
    (folder,) = (tmp_path / "data").iterdir()
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    yield folder
    for path, mode in modes.items():
        path.chmod(mode)


def told(tmp_path: Path, *words: object) -> str:
    """The last line of a command that ends with an error of one line."""
    done = run(tmp_path, *words, faults=[obey_permissions])
    assert done.status == 1
    assert "Traceback" not in done.text
    return done.text.splitlines()[-1]


def test_read_only_data(images: Path, tmp_path: Path) -> None:
    for path in sorted(images.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    images.chmod(0o555)
    done = run(tmp_path, *training(tmp_path / "data", epochs=1), faults=[obey_permissions])
    assert done.status == 0
    assert checkpoint(runs(tmp_path)[0]).is_file()


@pytest.mark.parametrize("place", ["train/good/000.png", "ground_truth/scratch/000.png"])
def test_what_may_not_be_read_is_named(images: Path, tmp_path: Path, place: str) -> None:
    """An image, a mask, and the folder itself."""
    path, data = images / place, training(tmp_path / "data", epochs=1)
    path.chmod(0)
    sentence = "cannot be read (Permission denied): see to that or remove it, and run again."
    assert told(tmp_path, *data) == f"error: The image '{path}' {sentence}"
    images.chmod(0)
    assert told(tmp_path, *data) == f"error: '{images / 'about.json'}' {WAY}"


def test_results_that_may_not_be_written(images: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir(mode=0o555)
    last = told(tmp_path, *training(tmp_path / "data", epochs=1))
    assert last == f"error: '{results / 'WTFlow'}' {WAY}"
    assert list(results.iterdir()) == []
