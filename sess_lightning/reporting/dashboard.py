"""Which of a run's charts a dashboard opens with: few enough to be read, each the answer to a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sess_lightning.scores import (
    DELETION,
    ENDS,
    FLAT,
    INSERTION,
    OVERALL,
    POINTING_GAME,
    REGION_SHARE,
    RELEVANCE_MASS,
    build,
    split,
)

CONTROLS = ("random", "centre")
"""Compared methods that do not use the model."""
MAIN = (OVERALL, INSERTION, DELETION, POINTING_GAME, RELEVANCE_MASS, REGION_SHARE, FLAT)
"""The explained method's scores with a chart on the first screen."""
MOST_POINTS = 200
"""The most points of a chart that is sent anew with every run."""


class Difference(NamedTuple):
    """The paired difference in overall after one run: the explained method less a compared one.

    Attributes:
        method: Key of the compared method.
        epoch: Epochs finished before the run.
        step: Optimiser steps so far.
        value: The difference.
        low: Lower end of its 95 % interval; None if there is none.
        high: Upper end.
    """

    method: str
    epoch: int
    step: int
    value: float
    low: float | None = None
    high: float | None = None


def rivals(methods: Iterable[str]) -> list[str]:
    """Return the compared methods that look at the model; if there are none, the controls."""
    every = [*dict.fromkeys(method for method in methods if method)]
    return [method for method in every if method not in CONTROLS] or every


def rival(values: Iterable[str]) -> str:
    """Return the key of the method that the explained one is measured against; empty if there is none.

    Args:
        values: Keys of scores.
    """
    return next(iter(rivals(key.method for key in map(split, values) if key is not None)), "")


def main_scores(values: Iterable[str]) -> set[str]:
    """Return the keys of the scores whose charts answer the first questions.

    They are the explained method's own, the overall of the method that it is measured against, and the
    Pointing Game of the centre, which centred objects make easy.
    """
    values = list(values)
    front = {*MAIN, build(OVERALL, rival(values)), build(POINTING_GAME, "centre")}
    return front.intersection(values)


def difference(values: Mapping[str, float], epoch: int, step: int) -> Difference | None:
    """Return the run's paired difference to the method that it is measured against, if it has one."""
    method = rival(values)
    value = values.get(build(OVERALL, method, minus=True)) if method else None
    ends = (values.get(build(OVERALL, method, minus=True, end=end)) for end in ENDS)
    return None if value is None else Difference(method, epoch, step, value, *ends)


def read_differences(states: Iterable[Any]) -> list[Difference]:
    """Return the differences that a checkpoint holds; anything else is left out."""
    kinds = ((str,), (int,), (int,), (float,), (float, type(None)), (float, type(None)))
    return [
        Difference(*state)
        for state in states
        if isinstance(state, (list, tuple)) and len(state) == len(kinds)
        if all(isinstance(value, kind) for value, kind in zip(state, kinds, strict=True))
    ]


def thinned(differences: Sequence[Difference], most: int = MOST_POINTS) -> list[Difference]:
    """Return the differences to the newest run's rival, at most ``most``, with the first and the newest."""
    same = [one for one in differences if one.method == differences[-1].method]
    every = max(1, -(-(len(same) - 1) // (most - 1)))
    return same if every == 1 else [same[0], *same[len(same) - 1 : 0 : -every][::-1]]
