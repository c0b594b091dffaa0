"""Every score once: its key, its label, which end is good; and how keys are built and split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

INSERTION, DELETION, OVERALL = "insertion", "deletion", "overall"
POINTING_GAME, DIFFICULT, RELEVANCE_MASS = "pointing_game", "pointing_game_difficult", "relevance_mass"
POINTING_GAME_IMAGES = "pointing_game_images"
REGION_SHARE, TIED_SHARE = "region_share", "tied_share"
DRIFT_PREVIOUS, DRIFT_INITIAL = "drift_previous", "drift_initial"
SELECTION, CURVES_N, SECONDS_PER_IMAGE = "selection", "curves_n", "seconds_per_image"
FLAT, FAILED = "flat", "failed"
CURVES = (INSERTION, DELETION)
"""The scores that are areas under curves, in the order in which curves are kept."""
OF_REGIONS = (POINTING_GAME, DIFFICULT, RELEVANCE_MASS, REGION_SHARE)
"""The scores that need boxes or masks."""
DRIFTS = (DRIFT_PREVIOUS, DRIFT_INITIAL)
"""The similarity of a map to that of an earlier run."""
ENDS = ("ci_low", "ci_high")
"""The ends of a score's 95 % interval."""
MINUS = "minus_"
"""Begins the keys of paired differences: the explained method less a compared one."""


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        key: Its name in keys, tables and files.
        label: Its display name.
        better: Which end is the good one; empty if neither is.
        worst: The value that stands in until the first run is over, so that a monitor finds the key; None for
            scores that are logged only when they are known.
        bounds: Lowest and highest possible value; None if unbounded.
        note: What it measures, in a few words.
        is_count: Whether it counts samples, images or runs.
        is_shared: Whether it belongs to the samples, whatever explains them: compared methods have none.
    """

    key: str
    label: str
    better: Literal["higher", "lower", ""] = ""
    worst: float | None = None
    bounds: tuple[float, float] | None = None
    note: str = ""
    is_count: bool = False
    is_shared: bool = False


class Key(NamedTuple):
    """The parts of a key; ``build(*key)`` is the key again.

    Attributes:
        score: Key of the score, one of ``SCORES``.
        method: Name of a compared method; empty for the explained one.
        minus: Whether it is the paired difference: the explained method less ``method``.
        end: ``"ci_low"`` or ``"ci_high"`` for an end of the interval, else empty.
    """

    score: str
    method: str = ""
    minus: bool = False
    end: str = ""


def _count(key: str, label: str, is_shared: bool = True) -> Score:
    return Score(key, label, is_count=True, is_shared=is_shared)


_UNIT = (0.0, 1.0)
DRIFT_NOTE = "rank correlation of maps, 1 if none has changed"

SCORES = {
    score.key: score
    for score in (
        Score(INSERTION, "Insertion", "higher", 0.0, _UNIT),
        Score(DELETION, "Deletion", "lower", 1.0, _UNIT),
        Score(OVERALL, "Overall", "higher", -1.0, (-1.0, 1.0), "insertion − deletion"),
        Score(POINTING_GAME, "Pointing Game", "higher", 0.0, _UNIT),
        Score(POINTING_GAME_IMAGES, "Pointing Game, mean over images", "higher", None, _UNIT),
        Score(DIFFICULT, "Pointing Game, difficult", "higher", None, _UNIT),
        Score(RELEVANCE_MASS, "Relevance mass", "higher", 0.0, _UNIT, "share inside the object"),
        Score(REGION_SHARE, "Object's share of the image", "", None, _UNIT, is_shared=True),
        Score("insertion_normalised", "Insertion, normalised", "higher"),
        Score("deletion_normalised", "Deletion, normalised", "lower"),
        Score(TIED_SHARE, "Tied pixels", "", None, _UNIT, "share of a map whose order is arbitrary"),
        Score(DRIFT_PREVIOUS, "Drift to the previous run", "", None, (-1.0, 1.0), DRIFT_NOTE),
        Score(DRIFT_INITIAL, "Drift to the first run", "", None, (-1.0, 1.0), DRIFT_NOTE),
        Score(SELECTION, "Selection", "higher"),
        Score(SECONDS_PER_IMAGE, "Seconds per image", "lower"),
        _count("n", "explained"),
        _count(CURVES_N, "with curves", is_shared=False),
        _count("pointing_game_n", "in the Pointing Game"),
        _count("pointing_game_difficult_n", "in the Pointing Game, difficult"),
        _count("images", "images"),
        _count("broken", "broken files"),
        _count("missing", "missing"),
        _count("all_difficult", "images with difficult objects only"),
        _count("skipped", "without object"),
        _count("left_out", "without a known class, or not finite"),
        _count("misclassified", "misclassified"),
        _count("nan", "not finite"),
        _count(FLAT, "flat maps", is_shared=False),
        _count("signed", "signed maps, without relevance mass", is_shared=False),
        _count(FAILED, "failed runs"),
    )
}
"""Every score there is, in the order in which tables show them."""


def build(score: str, method: str = "", minus: bool = False, end: str = "") -> str:
    """Return a key such as ``"insertion"``, ``"base/insertion"`` or ``"minus_base/overall_ci_low"``.

    Args:
        score: Key of the score.
        method: Name of a compared method; empty for the explained one.
        minus: Ask for the paired difference: the explained method less ``method``.
        end: ``"ci_low"`` or ``"ci_high"`` for an end of the interval.
    """
    prefix = f"{MINUS * minus}{method}/" if method else ""
    return f"{prefix}{score}_{end}" if end else prefix + score


def column_label(name: str) -> str:
    """Return a column's display name: the score's label, else the name in words."""
    known = {**{key: score.label for key, score in SCORES.items()}, ENDS[0]: "95 % from", ENDS[1]: "to"}
    return known.get(name, name.replace("_", " "))


def split(key: str) -> Key | None:
    """Return the parts of a key, or None if it names no score; the inverse of ``build``."""
    method, slash, score = key.rpartition("/")
    end = next((end for end in ENDS if score.endswith(f"_{end}")), "")
    score = score.removesuffix(f"_{end}")
    minus = method.startswith(MINUS)
    method = method.removeprefix(MINUS)
    if score not in SCORES or bool(slash) != bool(method) or "/" in method:
        return None
    return Key(score, method, minus, end)


def check_names(names: Iterable[str], explained: str = "") -> None:
    """Refuse names of compared methods that cannot be distinguished, or that would break the keys of scores.

    Args:
        names: Names of the methods that are scored beside the explained one.
        explained: Name of the explained method.

    Raises:
        ValueError: If a name is refused; the message says why.
    """
    seen = {_folded(explained): explained} if explained else {}
    for name in names:
        if reason := _objection(name):
            raise ValueError(f"compare: a method cannot be called {name!r}: {reason}; choose another name.")
        if (other := seen.get(_folded(name))) is not None:
            whose = "the explained method" if other is explained else "another"
            raise ValueError(
                f"compare: {name!r} cannot be told apart from {other!r}, the name of {whose}: files and "
                "loggers ignore case and punctuation; choose another name."
            )
        seen[_folded(name)] = name


def _folded(name: str) -> str:
    """Return a name as file systems that ignore case, and TensorBoard's tags, see it."""
    return re.sub(r"[^\w.-]", "_", name.casefold())


def _objection(name: str) -> str:
    """Return the objection to a name; empty if there is none."""
    if not name.strip():
        return "it is blank"
    if name != name.strip() or not name.isprintable():
        return "spaces around it and control characters are lost in tables"
    if "/" in name:
        return 'a "/" separates the method from the score in keys'
    if name.startswith(MINUS):
        return f'"{MINUS}" begins the keys of differences'
    if name.startswith("dataloader_idx_"):
        return "Lightning keeps such keys for itself"
    if name == "method" or split(name) is not None:
        return "scores and files give this name another meaning"
    return ""
