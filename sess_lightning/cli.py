"""The command line: ``sess-lightning evaluate | compare | explain | cost | fit | validate | test``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from sess_lightning.evaluation.comparison import compare

USAGE = """usage: sess-lightning COMMAND ...

  evaluate   score a method on a data set: the paper's tables, on its data or yours
  compare    draw finished evaluations side by side: ablations
  explain    explain one image
  cost       measure what explaining costs on a model, and what each knob would change
  fit, validate, test   Lightning's own commands, with the callback beside (--sess.*)

sess-lightning COMMAND --help tells more. All but compare need the extra "cli":
pip install 'sess-lightning[cli]', or in a clone pip install '.[cli]'.
"""
LIGHTNING = ("fit", "validate", "test")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command and what follows it; None reads this process's.

    Raises:
        SystemExit: With code 2 if there is no such command, or if it needs an extra that is not installed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else ""
    if command in ("-h", "--help"):
        sys.stdout.write(USAGE)
    elif command == "compare":
        run_compare(given[1:])
    elif command in LIGHTNING:
        _commands(command).ExplainedCLI(args=None if arguments is None else given)
    elif command in ("evaluate", "explain", "cost"):
        getattr(_commands(command), f"run_{command}")(given[1:])
    else:
        _stop(f"sess-lightning: there is no command {command!r}.\n{USAGE}" if command else USAGE)


def run_compare(arguments: Sequence[str]) -> None:
    """Draw evaluations side by side and print the paths of what was written."""
    parser = argparse.ArgumentParser("sess-lightning compare", description="Draw evaluations side by side.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of results, or their configs")
    parser.add_argument("--x", help="option to draw over, e.g. num_scales (default: what differs)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="for compare.csv and .png")
    config = parser.parse_args(arguments)
    try:
        written = compare(config.runs, config.out, config.x)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"{path}\n" for path in written))


def _commands(command: str) -> ModuleType:
    try:
        return import_module("sess_lightning.commands")
    except ModuleNotFoundError as error:
        if error.name != "jsonargparse":
            raise
        _stop(
            f"sess-lightning {command} needs jsonargparse: pip install 'sess-lightning[cli]' "
            "(in a clone: pip install '.[cli]').\n"
        )


def _stop(text: str) -> NoReturn:
    sys.stderr.write(text)
    sys.exit(2)
