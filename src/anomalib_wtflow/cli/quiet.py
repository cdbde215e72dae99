"""What other libraries print under the command line that a user cannot act on: each line of it, with a reason.

Only for the commands ``anomalib`` and ``anomalib-wtflow``: a Python program's warnings and logs are its own. A user's
``-W`` and ``PYTHONWARNINGS`` still win.
"""

import logging
import sys
import warnings
from pathlib import PurePath

COMMANDS = ("anomalib", "anomalib-wtflow")
WARNINGS: tuple[tuple[str, type[Warning], str, str], ...] = (
    (
        r"Importing from timm\.models\.layers is deprecated",
        FutureWarning,
        r"timm\.models\.layers",
        "anomalib 2.7 imports timm's old name",
    ),
    (
        r"The anomalib\.models\.components\.dinov2 package is deprecated",
        FutureWarning,
        r"anomalib\.models\.image\.dinomaly\..*",
        "anomalib 2.7 imports its own old name",
    ),
    (
        r"`torch\.jit\.script` is deprecated",
        FutureWarning,
        r".*",
        "anomalib's dependencies still use it, and torch names them as the place",
    ),
    (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        Warning,
        r"lightning\.pytorch\.utilities\._pytree",
        "Lightning 2.6 with torch from 2.11",
    ),
    (
        r"'pin_memory' argument is set as true but no accelerator is found",
        UserWarning,
        r"torch\.utils\.data\.dataloader",
        "anomalib's prediction loader asks for it on every machine",
    ),
    (
        r"The dirpath has changed from",
        UserWarning,
        r"lightning\.pytorch\.callbacks\.model_checkpoint",
        "each run of anomalib has a folder of its own",
    ),
)
"""Message, category and module of each warning (regular expressions), and why it is not for the user."""
LIGHTNING = tuple(
    f"{package}.utilities.rank_zero"
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
)
"""Lightning logs by one of these, by the order of its imports."""
LOGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (LIGHTNING, "\N{ELECTRIC LIGHT BULB} Tip", "an advertisement"),
    (LIGHTNING, "TPU available", "nobody asked for one"),
    (LIGHTNING, "Loading `train_dataloader`", "it says how the schedule is made"),
    (
        LIGHTNING,
        "The following callbacks returned in",
        "anomalib gives a model's callbacks to the trainer once more for the test after a training",
    ),
    (("anomalib.engine.engine",), "Overriding num_sanity_val_steps", "WTFlow needs it so"),
    (("anomalib.callbacks",), "Loading the callbacks", "it says that the program runs"),
)
"""Loggers and beginning of each line, and why it is not for the user."""
LEVELS: tuple[tuple[str, str], ...] = (
    ("onnx_ir", "torch.onnx says in a hundred lines what it simplifies"),
    ("onnxscript", "torch.onnx says in a hundred lines what it simplifies"),
)
"""Loggers of which only warnings are for the user, and why."""


def under_command() -> bool:
    """Whether the process is one of the commands."""
    return bool(sys.argv) and PurePath(sys.argv[0]).stem in COMMANDS


def quiet_warnings() -> None:
    """Leave out :data:`WARNINGS`, before the libraries that give them are imported."""
    if not under_command():
        return
    for message, category, module, _ in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module, append=True)


def quiet_logs() -> None:
    """Leave out :data:`LOGS` and what :data:`LEVELS` hide, and print each line once.

    anomalib's root logger has a plain and a rich handler. The rich one is kept where the output is a terminal, the
    plain one where it goes to a file.
    """
    if not under_command():
        return
    for names, beginning, _ in LOGS:
        for name in names:
            logging.getLogger(name).addFilter(_Without(beginning))
    for name, _ in LEVELS:
        logging.getLogger(name).setLevel(logging.WARNING)
    root = logging.getLogger()
    rich = [handler for handler in root.handlers if type(handler).__module__ == "rich.logging"]
    plain = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    if rich and plain:
        for handler in plain if sys.stderr.isatty() else rich:
            root.removeHandler(handler)


class _Without(logging.Filter):
    """Drops the lines that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
