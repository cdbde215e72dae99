"""The command line in processes of their own that need not import torch again, with something going wrong in them."""

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["anomalib.cli.cli", "anomalib_wtflow.lightning_model"])


class Fault(NamedTuple):
    """What a process is sent when it calls a function (``module:name``) for the n-th time, counted from 0."""

    place: str
    call: int = 0
    number: int = signal.SIGKILL


class Done(NamedTuple):
    """How a command ended, and all that it printed."""

    status: int
    text: str


class Command:
    """``anomalib`` with some arguments, in a folder and with variables of its own; one that is None is unset.

    Each fault is a :class:`Fault`, or a function that is called before the command and may spoil anything.
    """

    def __init__(
        self, folder: Path, *arguments: Any, faults: Sequence[Any] = (), log: str = "log.txt", **environment: str | None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / log
        words = ["anomalib", *map(str, arguments)]
        self.process = CONTEXT.Process(target=_run, args=(folder, words, list(faults), self.log, environment))
        self.process.start()

    def end(self, seconds: float = 180) -> Done:
        """Wait for it, and fail if it hangs."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
        assert status is not None, f"still runs after {seconds} s: {self.log.read_text()[-2000:]}"
        return Done(status, self.log.read_text(errors="replace"))


def run(folder: Path, *arguments: Any, **kwargs: Any) -> Done:
    """Run a :class:`Command` to its end."""
    return Command(folder, *arguments, **kwargs).end()


def training(data: Path, *more: Any, epochs: int = 3) -> list[Any]:
    """Arguments of a small training: 16 drawn images, four steps an epoch, no pictures."""
    words = ["train", "--model", "WTFlow", "--model.image_size", 64, "--model.max_epochs", epochs]
    words += ["--model.visualizer", "false", "--data", "SyntheticParts", "--data.root", data, "--data.side", 64]
    words += ["--data.train_images", 16, "--data.train_batch_size", 4, "--data.test_images", 8]
    return [*words, "--data.defect_images", 4, "--model.overrides.plateau", 0, *more]


def runs(folder: Path) -> list[Path]:
    """The folders of the runs that started in a folder, in their order."""
    found = folder.glob("results/WTFlow/SyntheticParts/v*")
    return sorted(found, key=lambda path: int(path.name[1:]))


def checkpoint(run: Path) -> Path:
    """Where a run keeps its model."""
    return run / "weights" / "lightning" / "model.ckpt"


def state(run: Path) -> dict[str, torch.Tensor]:
    """All that a run's model holds, the thresholds, too; loading fails for half a file."""
    return torch.load(checkpoint(run), weights_only=True)["state_dict"]


def _run(folder: Path, words: list[str], faults: list[Any], log: Path, environment: dict[str, str | None]) -> None:
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None  # the parent's; TMPDIR may be another one
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    torch.set_num_threads(1)
    for fault in faults:
        if isinstance(fault, Fault):
            _place(fault)
        else:
            fault()
    sys.argv = words
    try:
        importlib.import_module("anomalib.cli.cli").main()
    except Exception:  # multiprocessing would show it in a way of its own
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def obey_permissions() -> None:
    """Have this process obey the permissions of files although it is root's: root may pass over them (Linux)."""
    if os.geteuid() == 0:
        override, search = 1, 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their upper halves
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << override | 1 << search)
        assert libc.capset(header, sets) == 0


def _place(fault: Fault) -> None:
    place(fault.place, fault.call, lambda *args, **kwargs: os.kill(os.getpid(), fault.number))


def place(where: str, call: int, what: Any) -> None:
    """Call a function with the arguments of another one, before the latter's n-th call."""
    module, _, name = where.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, last), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            what(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, last, wrapped)
