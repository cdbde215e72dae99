"""The console command ``anomalib-wtflow``."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``anomalib-wtflow calibrate …``, ``diagnose …`` or ``settings``.

    Args:
        arguments: Arguments of the command line; None for the process's own.
    """
    from jsonargparse import ArgumentParser

    from anomalib_wtflow import calibrate, diagnose
    from anomalib_wtflow.cli.settings_table import print_settings

    parser = ArgumentParser(prog="anomalib-wtflow", description="Tools around the anomalib model WTFlow.")
    commands = parser.add_subcommands()
    for function, summary in (
        (calibrate, "Set a trained model's thresholds with new good images, without training."),
        (diagnose, "Write a page of figures that shows why a trained model separates good from defective parts."),
    ):
        command = ArgumentParser(description=summary)
        command.add_function_arguments(function)
        commands.add_subcommand(function.__name__, command, help=summary)
    summary = "List every setting with its default, the paper's value, and its meaning."
    table = ArgumentParser(description=summary)
    table.add_argument("--markdown", action="store_true", help="As docs/settings.md has it.")
    commands.add_subcommand("settings", table, help=summary)

    given = parser.instantiate_classes(parser.parse_args(arguments))
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need be no UTF-8
    if given.subcommand == "settings":
        print_settings(given.settings.markdown)
    elif given.subcommand == "calibrate":
        sys.stdout.write(f"{calibrate(**given.calibrate.as_dict())}\n")
    else:
        sys.stdout.write(f"Wrote {diagnose(**given.diagnose.as_dict())}\n")
