"""The console command ``anomalib-wtflow``."""

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from anomalib_wtflow.cli.errors import SAID, sentence_of
from anomalib_wtflow.cli.quiet import quiet_warnings


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``anomalib-wtflow calibrate …``, ``diagnose …`` or ``settings``.

    Args:
        arguments: Arguments of the command line; None for the process's own.

    Raises:
        SystemExit: With 2 if the arguments are wrong, with 1 if the work fails; one sentence says why. An error that
            is not ours, such as one of a data module of the user's, is raised as it is.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    quiet_warnings()
    from jsonargparse import ArgumentParser

    commands = {
        "calibrate": _calibration_parser(),
        "diagnose": _diagnosis_parser(arguments),
        "settings": _settings_parser(),
    }
    parser = ArgumentParser(prog="anomalib-wtflow", description="Tools around the anomalib model WTFlow.")
    choices = parser.add_subcommands()
    choices.add_subcommand("calibrate", commands["calibrate"], help="Set the threshold with new good images.")
    choices.add_subcommand("diagnose", commands["diagnose"], help="Why does a trained model separate?")
    choices.add_subcommand("settings", commands["settings"], help="Which settings are there?")
    given = parser.parse_args(arguments)
    if given.subcommand == "settings":
        from anomalib_wtflow.cli.settings_table import print_settings

        print_settings(given.settings.markdown)
        return
    if given.subcommand == "calibrate":
        _run(lambda: _calibrate(given.calibrate))
        return
    if not given.diagnose.toy and (given.diagnose.ckpt_path is None or given.diagnose.data is None):
        commands["diagnose"].error("give --ckpt_path and --data, or --toy for the method on drawn data.")
    _run(lambda: f"Wrote {_diagnose(parser.instantiate_classes(given).diagnose)}")


def _run(command: Callable[[], str]) -> None:
    try:
        text = command()
    except SAID as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        sys.exit(f"error: {sentence}")
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{text}\n".encode(encoding, "backslashreplace").decode(encoding))  # names need be no UTF-8


def _calibration_parser() -> Any:
    from jsonargparse import ArgumentParser

    from anomalib_wtflow import calibrate

    parser = ArgumentParser(description="Set a trained model's thresholds with new good images, without training.")
    parser.add_function_arguments(calibrate)
    return parser


def _calibrate(given: Any) -> str:
    from anomalib_wtflow import calibrate

    done = calibrate(**given.as_dict())
    return f"{done}\nWrote {done.path}"


def _settings_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="List every setting with its default, the paper's value, and its meaning.")
    parser.add_argument("--markdown", action="store_true", help="As docs/settings.md has it.")
    return parser


def _diagnosis_parser(arguments: Sequence[str]) -> Any:
    from anomalib.data import AnomalibDataModule
    from jsonargparse import ArgumentParser

    from anomalib_wtflow import diagnose

    parser = ArgumentParser(
        description="Write a page of figures that shows why a trained model separates good from defective parts."
    )
    parser.add_argument("--toy", action="store_true", help="Show the method on drawn data; no checkpoint needed.")
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint of a WTFlow model.")
    parser.add_argument(
        "--data",
        type=str if _names_a_path(arguments) else AnomalibDataModule,
        help="anomalib data module with its --data.… arguments, a YAML file with its config, a folder in MVTec's "
        "layout, or a folder of images.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="With --toy: trainings of each field.")
    parser.add_function_arguments(diagnose, skip={"ckpt_path", "data", "output", "progress"})
    parser.add_argument("--output", type=str | None, default=None, help="Folder; results/diagnose[-toy] by default.")
    return parser


def _diagnose(given: Any) -> Path:
    from anomalib_wtflow import diagnose, diagnose_toy

    if given.toy:
        return diagnose_toy(given.output or "results/diagnose-toy", given.seeds)
    return diagnose(
        given.ckpt_path,
        given.data,
        given.output or "results/diagnose",
        given.flow_images,
        given.control_steps,
        given.log_density,
        given.device,
        given.seed,
    )


def _names_a_path(arguments: Sequence[str]) -> bool:
    """Whether ``--data`` is a file or folder, there or not, rather than the name of a data module."""
    values = [value for flag, value in pairwise(arguments) if flag == "--data"]
    values += [argument.removeprefix("--data=") for argument in arguments if argument.startswith("--data=")]
    return any(Path(value).exists() or not _is_class(value) for value in values)


def _is_class(name: str) -> bool:
    """Whether a name is that of a data module that is loaded, or has a package to look for it in."""
    package, dot, _ = name.partition(".")
    if dot:
        return package.isidentifier() and find_spec(package) is not None
    from anomalib.data import AnomalibDataModule

    kinds = [AnomalibDataModule]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return name in {kind.__name__ for kind in kinds}
