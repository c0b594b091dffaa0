import pytest

from sess_lightning.reporting.dashboard import (
    Difference,
    difference,
    main_scores,
    read_differences,
    rival,
    rivals,
    thinned,
)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ([], []), (["random", "centre"], ["random", "centre"]),
        (["random", "base", "rise", "base"], ["base", "rise"]), (["", "base"], ["base"]),
    ],
)  # fmt: skip
def test_rivals_are_the_methods_that_look_at_the_model_else_the_controls(methods, expected):
    assert rivals(methods) == expected


def test_the_rival_is_the_first_of_them():
    assert rival(["overall", "random/overall", "rise/overall", "base/overall"]) == "rise"
    assert rival(["overall", "of the future"]) == ""


def test_the_main_scores_are_those_that_were_measured():
    values = [
        "overall",
        "flat",
        "n",
        "base/overall",
        "base/insertion",
        "minus_base/overall",
        "centre/pointing_game",
    ]
    assert main_scores(values) == {"overall", "flat", "base/overall", "centre/pointing_game"}


def test_a_run_without_the_rivals_difference_has_none():
    assert difference({"overall": 0.5}, 1, 9) is None
    assert difference({"overall": 0.5, "base/overall": 0.25}, 1, 9) is None
    values = {
        "minus_base/overall": 0.25,
        "minus_base/overall_ci_low": 0.125,
        "minus_base/overall_ci_high": 0.5,
    }
    assert difference(values, 1, 9) == Difference("base", 1, 9, 0.25, 0.125, 0.5)
    assert difference({"minus_base/overall": 0.25}, 1, 9) == Difference("base", 1, 9, 0.25, None, None)


def test_what_a_checkpoint_of_another_version_holds_is_left_out():
    states = [["base", 1, 9, 0.25, None, None], ["base", 1, 9, 0.25], 3, ["base", "1", 9, 0.25, None, None]]
    assert read_differences(states) == [Difference("base", 1, 9, 0.25)]


@pytest.mark.parametrize("count", [1, 2, 200, 201, 1000, 1001])
def test_long_trainings_keep_the_first_and_the_newest_run(count):
    runs = [Difference("base", i, i, float(i)) for i in range(count)]
    kept = thinned([Difference("other", 0, 0, 0.0), *runs])
    assert len(kept) <= 200
    assert (kept[0], kept[-1]) == (runs[0], runs[-1])
    assert [*kept] == sorted(kept, key=lambda one: one.step)
    assert count > 200 or kept == runs
