"""What the command line leaves out, and only it."""

import logging
import re
import sys
import warnings

import pytest

from anomalib_wtflow.cli import quiet


@pytest.fixture
def as_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anomalib", "train"])


def test_a_program_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect.py"])
    with warnings.catch_warnings():
        before = list(warnings.filters)
        quiet.quiet_warnings()
        assert warnings.filters == before
    filters = {name: list(logging.getLogger(name).filters) for names, *_ in quiet.LOGS for name in names}
    quiet.quiet_logs()
    assert {name: logging.getLogger(name).filters for name in filters} == filters


@pytest.mark.usefixtures("as_command")
def test_only_the_listed_warnings_of_the_listed_modules_are_left_out() -> None:
    message = "Importing from timm.models.layers is deprecated, please import via timm.layers"
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        quiet.quiet_warnings()
        for module, category, text in (
            ("timm.models.layers", FutureWarning, message),
            ("my.module", FutureWarning, message),
            ("timm.models.layers", UserWarning, message),
            ("timm.models.layers", FutureWarning, "Something else"),
        ):
            warnings.warn_explicit(text, category, "file.py", 1, module=module)
    assert [str(each.message) for each in seen] == [message, message, "Something else"]


@pytest.mark.usefixtures("as_command")
def test_a_users_own_filter_wins() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        quiet.quiet_warnings()
        warnings.warn_explicit("The dirpath has changed from", UserWarning, "f", 1, quiet.WARNINGS[-1][2])
    assert len(seen) == 1


@pytest.mark.usefixtures("as_command")
def test_listed_lines_are_left_out_and_each_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.logging import RichHandler

    root = logging.getLogger()
    plain, rich = logging.StreamHandler(), RichHandler()
    monkeypatch.setattr(root, "handlers", [plain, rich])
    loggers = [logging.getLogger(name) for names, *_ in quiet.LOGS for name in names]
    for logger in loggers:
        monkeypatch.setattr(logger, "filters", [])
    for name, _ in quiet.LEVELS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    quiet.quiet_logs()
    assert root.handlers == [plain]  # pytest's stderr is no terminal
    logger = logging.getLogger(quiet.LIGHTNING[0])
    records = [
        logger.makeRecord(logger.name, logging.INFO, "f", 1, text, (), None) for text in ("TPU available", "GPU")
    ]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


def test_each_line_of_the_lists_has_a_reason() -> None:
    for message, category, module, reason in quiet.WARNINGS:
        assert re.compile(message)
        assert re.compile(module)
        assert issubclass(category, Warning)
        assert reason
    assert all(reason for *_, reason in (*quiet.LOGS, *quiet.LEVELS))
