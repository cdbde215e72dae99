"""How much memory is left: the machine's, and that of the control groups, or container, that this process is in."""

from collections.abc import Iterator
from math import inf
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
"""Which control groups this process is in, a line each: ``number:controllers:path``; version 2 names no controllers."""
MOUNT = Path("/sys/fs/cgroup")
MACHINE = Path("/proc/meminfo")
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version: the files of a group's limit and use, and the name in ``memory.stat`` of what it can take back."""


def available_memory() -> float:
    """Return how many bytes this process can still take without swapping; infinity where nothing says (not Linux)."""
    return min(rooms(), default=inf)


def rooms() -> Iterator[float]:
    """Yield what the machine has left, and each control group that has a limit and may be read."""
    for line in lines(MACHINE):
        if line.startswith("MemAvailable"):
            yield 1024.0 * int(line.split()[1])
    for line in lines(GROUPS):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            version, top = (1, MOUNT / "memory") if controllers else (2, MOUNT)
            # A container may see its own group as the top, under the path that it has outside.
            group = top / path.lstrip("/")
            yield from (room(each, version) for each in (group, *group.parents) if top in (each, *each.parents))


def room(group: Path, version: int) -> float:
    """Return what a control group leaves: its limit less its use, pages of files aside; infinity without a limit."""
    limit, used, inactive = FILES[version]
    try:
        taken = int((group / used).read_text()) - sum(
            int(line.split()[1]) for line in lines(group / "memory.stat") if line.startswith(f"{inactive} ")
        )
        return max(0.0, float((group / limit).read_text().strip().replace("max", "inf")) - taken)
    except (OSError, ValueError):
        return inf


def lines(file: Path) -> list[str]:
    """Read a file's lines; none if it cannot be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
