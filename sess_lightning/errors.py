"""Errors of the command line, each as one line for users."""

from __future__ import annotations

import os
import re
from argparse import ArgumentError
from pathlib import Path

import yaml

from sess_lightning.evaluation.calls import method_spec
from sess_lightning.evaluation.datasets import BrokenSampleError

LONGEST = 600
"""The most characters of a line."""
EXPECTED = (ArgumentError, BrokenSampleError, ImportError, OSError, ValueError, yaml.YAMLError)
"""Errors whose text says what to do."""


def make_folder(folder: Path) -> None:
    """Create the folder of the output before any work is done.

    Raises:
        ArgumentError: If it cannot be created, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(None, f"--out: {folder} cannot be created ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise ArgumentError(None, f"--out: {folder} is not writable; choose another folder.")


def is_misuse(error: Exception) -> bool:
    """Return whether an error of Lightning's commands is about their arguments, not about the training."""
    is_ours = isinstance(error, (TypeError, ValueError)) and str(error).startswith("SESSCallback: ")
    is_lightnings = type(error).__name__ == "MisconfigurationException" or "SaveConfigCallback" in str(error)
    return is_lightnings or is_ours or isinstance(error, ArgumentError)


def one_line(command: str, error: Exception) -> str:
    """Return what is wrong and how to fix it, as one line for users.

    Args:
        command: Name of the command that raised the error.
        error: The error.
    """
    text = _of_option(" ".join(str(error).split()))
    if found := re.search(r"SaveConfigCallback expected (\S+) to NOT exist", text):
        text = f"{found[1]} is an earlier run's; move it, or use another --trainer.default_root_dir."
    if "mat1 and mat2 shapes cannot be multiplied" in text:
        text += " The model may take images of one size only; give it by --size."
    is_expected = isinstance(error, EXPECTED) or is_misuse(error)
    if not is_expected:
        text = f"{type(error).__name__}: {text}"
    if len(text) > LONGEST:  # The remedy stands at the end.
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    text += "" if text.endswith((".", "?", "!")) else "."
    if isinstance(error, ArgumentError):
        text += f" See sess-lightning {command} --help."
    elif not is_expected:
        text += " --traceback shows where."
    return f"sess-lightning {command}: {text}\n"


def _of_option(text: str) -> str:
    """Return jsonargparse's texts in fewer words, with the option first."""
    found = re.search(r'^Parser key "([^"]+)": ', text)
    option = f"--{found[1].removeprefix('experiment.')}: " if found else ""
    given = re.search(r"(?:dot import path string|import path format): (.+?)(?: - | Given value|$)", text)
    if given and re.search("method|compare", option):
        try:
            method_spec(given[1])
        except ValueError as reason:
            return f"{option}{reason}"
    if found:
        text = text[found.end() :]
    if "any of the Union subtypes" in text:
        reasons = re.findall(r"- (.+?)(?= - | Given value|$)", text.partition("Errors: ")[2])
        kinds = [
            found[1] for reason in reasons if (found := re.match(r"Expected an? (?:<class ')?(\w+)", reason))
        ]
        value = re.search(r"Given value: (\S+)$", text)
        told = [reason for reason in reasons if not re.match("Expected an? (?!dot|path)", reason)]
        text = told[0] if told else "expected " + " or ".join(kind for kind in kinds if kind != "NoneType")
        text += f", got {value[1]}" if value and not told else ""
    text = re.sub(r"(required: |, )(?:fit|validate|test|predict)\.(?=\w)", r"\1--", text)
    text = re.sub(r"Problem with given class_path \S+: ", "", text)
    text = re.sub(r'Parser key "([^"]+)": ', r"\1: ", text).replace(". Got value: ", ", got ")
    text = re.sub(r"^[Ee]xpected a dot import path string: (\S+)$", r"there is no \1", text)
    return option + re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("Expected a ", "expected ")
