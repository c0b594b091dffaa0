"""The command line: ``sess-lightning evaluate | compare | explain | cost | fit | validate | test``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from sess_lightning.errors import is_misuse, make_folder, one_line
from sess_lightning.evaluation.comparison import compare

USAGE = """usage: sess-lightning COMMAND ...

  explain    draw where a model looks in an image:       sess-lightning explain cat.jpg
  evaluate   score a method on a folder of images:       sess-lightning evaluate photos/
  compare    show finished evaluations side by side:     sess-lightning compare runs/a runs/b
  cost       measure what explaining costs on a model:   sess-lightning cost --model.name resnet50
  fit, validate, test
             Lightning's commands for a module of yours, with its explanations logged:
             sess-lightning fit --model my_module.Net --data my_module.Data

sess-lightning COMMAND --help lists a command's options; --traceback shows where an error occurred.
All but compare need the extra "cli": pip install 'sess-lightning[cli]', in a clone pip install '.[cli]'.
"""
LIGHTNING = ("fit", "validate", "test")
COMPARE = """Show finished evaluations side by side: as a table, as compare.csv and as compare.png.

examples:
  sess-lightning compare runs/gradcam runs/rise
  sess-lightning compare runs/figure5_n* --x num_scales --out runs/figure5"""
INTERRUPTED = 130
"""What shells expect of a process that Ctrl-C has stopped."""
COMMANDS = ("evaluate", "compare", "explain", "cost", *LIGHTNING)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command and what follows it; None reads this process's.

    Raises:
        SystemExit: With code 2 if something is wrong, 130 after Ctrl-C: one line says what, a traceback is
            shown with ``--traceback`` or if the environment's ``SESS_LIGHTNING_TRACEBACK`` is not empty.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    shows = "--traceback" in given or bool(os.environ.get("SESS_LIGHTNING_TRACEBACK"))
    given = [argument for argument in given if argument != "--traceback"]
    command = given[0] if given else ""
    if command in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return
    if command not in COMMANDS:
        near = get_close_matches(command, COMMANDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        _stop(f"sess-lightning: there is no command {command!r}.{hint}\n{USAGE}" if command else USAGE)
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)  # As python -m does: modules in the current folder are found.
    if arguments is None:
        sys.argv[1:] = given
    try:
        _run(command, given, is_own=arguments is None)
    except KeyboardInterrupt:
        if shows or command in LIGHTNING:
            raise
        resumes = "; the same command continues where it stopped" if command == "evaluate" else ""
        _stop(f"\nsess-lightning {command}: interrupted{resumes}.\n", INTERRUPTED)
    except Exception as error:
        # What a training raises is its author's to read.
        if shows or (command in LIGHTNING and not is_misuse(error)):
            raise
        _stop(one_line(command, error))


def _run(command: str, given: Sequence[str], is_own: bool) -> None:
    if command == "compare":
        run_compare(given[1:])
    elif command in LIGHTNING:
        _commands(command).ExplainedCLI(args=None if is_own else given)
    else:
        getattr(_commands(command), f"run_{command}")(given[1:])


def run_compare(arguments: Sequence[str]) -> None:
    """Print evaluations side by side, draw them, and name what was written."""
    parser = argparse.ArgumentParser(
        "sess-lightning compare",
        usage="sess-lightning compare RUN [RUN ...] [options]",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of an evaluation, or its config"
    )
    parser.add_argument("--x", help="option on the x-axis, such as num_scales (default: what differs)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        help="folder for compare.csv and compare.png (default: runs/compare)",
    )
    config = parser.parse_args(arguments)
    make_folder(config.out)
    written = compare(config.runs, config.out, config.x)
    sys.stdout.write(written[0].read_text(encoding="utf-8"))
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


def _stop(text: str, code: int = 2) -> NoReturn:
    sys.stderr.write(text)
    sys.exit(code)
