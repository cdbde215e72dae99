"""How much memory a process can still take, with files of the machine and of control groups that are drawn here."""

from math import inf
from pathlib import Path

import pytest

from anomalib_wtflow.features import memory

GIB = 2**30
V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB left and no groups yet."""
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MOUNT", tmp_path / "mount")
    (tmp_path / "meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemFree: 5 kB\nMemAvailable: {8 * 2**20} kB\n")
    return tmp_path


def make_group(folder: Path, names: tuple[str, str], limit: int | str, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_without_groups_it_is_the_machines(machine: Path) -> None:
    assert memory.available_memory() == 8 * GIB
    (machine / "meminfo").unlink()
    assert memory.available_memory() == inf


@pytest.mark.parametrize(
    ("line", "top", "names", "stat"),
    [
        ("0::/docker/a", "", V2, f"anon 7\ninactive_file {GIB // 2}\nworkingset_refault_file 9"),
        ("4:cpu,memory:/docker/a", "memory", V1, f"inactive_file 7\ntotal_inactive_file {GIB // 2}"),
    ],
)
def test_a_groups_limit_less_its_use_without_pages_of_files(
    machine: Path, line: str, top: str, names: tuple[str, str], stat: str
) -> None:
    (machine / "cgroup").write_text(f"5:cpuset:/docker\n{line}\n")
    make_group(machine / "mount" / top / "docker" / "a", names, 3 * GIB, 2 * GIB, stat)
    assert memory.available_memory() == 1.5 * GIB


def test_the_group_above_may_leave_less(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/slice/job\n")
    make_group(machine / "mount" / "slice" / "job", V2, 6 * GIB, 1 * GIB)
    assert memory.available_memory() == 5 * GIB
    make_group(machine / "mount" / "slice", V2, 7 * GIB, 3 * GIB)
    assert memory.available_memory() == 4 * GIB
    make_group(machine / "mount" / "slice", V2, 7 * GIB, 8 * GIB)
    assert memory.available_memory() == 0


def test_a_container_that_sees_its_own_group_as_the_top(machine: Path) -> None:
    """Its path is that outside, which is not there inside."""
    (machine / "cgroup").write_text("4:memory:/docker/0123\n")
    make_group(machine / "mount" / "memory", V1, 2 * GIB, GIB)
    assert memory.available_memory() == GIB


@pytest.mark.parametrize("limit", ["max", 2**63 - 4096, "", "nonsense"])
def test_a_group_without_a_limit_leaves_what_the_machine_does(machine: Path, limit: int | str) -> None:
    (machine / "cgroup").write_text("0::/job\n")
    make_group(machine / "mount" / "job", V2, limit, GIB)
    assert memory.available_memory() == 8 * GIB


def test_this_machine_says_something() -> None:
    """At least this test fits, and not more than the machine has."""
    total = next((int(line.split()[1]) for line in memory.lines(Path("/proc/meminfo")) if "MemTotal" in line), inf)
    assert 0 < memory.available_memory() <= 1024 * total
