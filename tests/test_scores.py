"""Scores and their keys."""

import ast
import re
from itertools import product
from pathlib import Path

import pytest

import sess_lightning
from sess_lightning.scores import (
    CURVES_N,
    ENDS,
    SCORES,
    SELECTION,
    Key,
    build,
    check_names,
    split,
)

ROOT = Path(sess_lightning.__file__).parent


def test_keys_are_written_as_documented():
    assert build("insertion") == "insertion"
    assert build("insertion", "base") == "base/insertion"
    assert build("overall", "base", minus=True, end="ci_low") == "minus_base/overall_ci_low"
    assert build("pointing_game_difficult", end="ci_high") == "pointing_game_difficult_ci_high"


@pytest.mark.parametrize("method", ["", "base", "plus plus", "GradCAM++", "a.b-c_ci_low"])
def test_a_key_is_read_as_it_was_built(method):
    for score, end, minus in product(SCORES, ("", *ENDS), (False, True) if method else (False,)):
        assert split(build(score, method, minus, end)) == Key(score, method, minus, end)


@pytest.mark.parametrize(
    "key", ["", "val/acc", "base/", "/n", "minus_/n", "a/b/n", "insertion_ci", "overall_ci_low_ci_high", "N"]
)
def test_a_key_of_no_score_is_nobodys(key):
    assert split(key) is None


def test_scores_are_told_apart_by_key_and_label():
    assert all(score.key == key for key, score in SCORES.items())
    assert len({score.label for score in SCORES.values()}) == len(SCORES)


def test_the_worst_value_is_the_bad_end_of_the_bounds():
    worst = {key: score.worst for key, score in SCORES.items() if score.worst is not None}
    assert worst == {
        "insertion": 0.0,
        "deletion": 1.0,
        "overall": -1.0,
        "pointing_game": 0.0,
        "relevance_mass": 0.0,
    }
    for key, value in worst.items():
        assert value == SCORES[key].bounds[SCORES[key].better == "lower"]


def test_ordinary_names_are_welcome():
    check_names(["base", "random", "centre", "plus plus", "Grad-CAM", "GradCAM++", "GradCAM", "minus", "été"])
    check_names([])
    check_names(["base"], explained="SESS")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it is blank"),
        (" ", "it is blank"),
        ("a ", "spaces around it"),
        ("a\nb", "control characters"),
        ("cam/base", 'a "/" separates'),
        ("minus_blur", '"minus_" begins the keys of differences'),
        ("dataloader_idx_0", "Lightning keeps such keys"),
        ("insertion", "another meaning"),
        ("overall_ci_low", "another meaning"),
        ("method", "another meaning"),
    ],
)
def test_a_name_is_refused_with_a_reason(name, reason):
    with pytest.raises(ValueError, match=rf"called {re.escape(repr(name))}: .*{re.escape(reason)}"):
        check_names([name])


@pytest.mark.parametrize(("one", "other"), [("CAM", "cam"), ("a b", "a_b"), ("a b", "a+b")])
def test_names_that_loggers_would_merge_are_refused(one, other):
    with pytest.raises(
        ValueError, match=f"{re.escape(repr(other))} cannot be told apart from '{one}', the name of another"
    ):
        check_names([one, other])


def test_the_explained_methods_name_is_taken():
    with pytest.raises(
        ValueError, match="'SESS' cannot be told apart from 'SESS', the name of the explained method"
    ):
        check_names(["base", "SESS"], explained="SESS")


def _texts(tree):
    """Return the texts in a module's code; ``__all__`` names functions, and docstrings are prose."""
    prose = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        for part in ast.walk(node.value)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    }


@pytest.mark.parametrize("module", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_writes_the_key_of_a_score_anew(module):
    # Counts have the names of what their module counts; "selection" is also a state of the history.
    keys = {key for key, score in SCORES.items() if not score.is_count} - {SELECTION} | {CURVES_N}
    if module.name != "scores.py":
        assert _texts(ast.parse(module.read_text(encoding="utf-8"))) & keys == set()
