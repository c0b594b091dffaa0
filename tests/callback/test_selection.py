import math

import pytest
import torch

from sess_lightning.callback.history import RunHistory
from sess_lightning.callback.runs import FIGURES, Run
from sess_lightning.callback.selection import Selection, select, standard_error

COUNT = 100.0  # At 0.9 a standard error is 0.031.


def chosen(*runs, count=COUNT):
    """Return the run that a monitor of ``value`` keeps."""
    so_far, best, kept = Selection(), -math.inf, None
    for i, (accuracy, quality) in enumerate(runs):
        so_far = select(so_far, accuracy, quality, count)
        if so_far.value > best:
            best, kept = so_far.value, i
    return kept


@pytest.mark.parametrize(
    ("runs", "kept"),
    [
        ([(0.90, 0.5), (0.91, 0.4)], 0),  # As accurate, explained worse.
        ([(0.90, 0.4), (0.89, 0.5)], 1),  # As accurate, explained better.
        ([(0.90, 0.4), (0.80, 0.9)], 0),  # Explained better, but less accurate.
        ([(0.80, 0.9), (0.90, 0.4)], 1),  # More accurate, whatever the maps.
        ([(0.80, 0.9), (0.90, 0.4), (0.91, 0.3), (0.885, 0.6)], 3),
        ([(0.90, 0.5), (0.92, 0.4), (0.94, 0.3)], 2),  # The first falls behind at last, step by step.
        ([(0.90, 0.5), (0.90, 0.5)], 0),
        ([(0.5, 1.0), (0.9, 0.0)], 1),
        ([(0.5, 0.2), (math.nan, 0.9), (0.5, math.nan)], 0),
    ],
)
def test_of_the_runs_within_a_standard_error_of_the_best_the_best_explained_is_kept(runs, kept):
    assert chosen(*runs) == kept


def test_what_is_kept_is_never_less_accurate_than_the_best_by_more_than_a_standard_error():
    so_far, best = Selection(), 0.0
    for i in range(500):
        accuracy, quality = 0.5 + 0.5 * math.sin(i) ** 2 * i / 500, math.cos(7 * i) ** 2
        so_far, best = select(so_far, accuracy, quality, COUNT), max(best, accuracy)
        assert so_far.accuracy >= best - standard_error(best, COUNT)
        assert so_far.best == best


def test_without_a_known_count_accuracy_decides_and_quality_breaks_ties():
    assert chosen((0.90, 0.9), (0.9001, 0.1), count=math.inf) == 1
    assert chosen((0.90, 0.1), (0.90, 0.9), count=math.inf) == 1


def test_the_standard_error_is_that_of_a_share():
    assert standard_error(0.9, 10_000.0) == pytest.approx(0.003, rel=1e-2)
    assert standard_error(1.0, 100.0) == pytest.approx(math.sqrt(102 / 104 * 2 / 104 / 104))


class Chosen:
    """A history's view of runs whose accuracy is logged in percent, at first below 1."""

    def __init__(self, *accuracies):
        self.history = RunHistory("sess", None, rings=False)
        self.values = [self.judged(i, accuracy) for i, accuracy in enumerate(accuracies)]

    def judged(self, i, accuracy):
        small, mass = torch.zeros(2, 4, 4), torch.tensor([0.25, 0.75])
        figures = {**dict.fromkeys(FIGURES, mass), "region_share": mass}
        self.history.start_run(i)
        self.history.add(Run(i, i, (1, 2), figures, small))
        metrics = {"val_acc": torch.tensor(accuracy)}
        self.history.judge(metrics, COUNT, True, str)
        return metrics["sess/selection"].item()


def test_an_accuracy_that_turns_out_to_be_in_percent_was_so_before():
    percent, share = Chosen(0.5, 30.0, 40.0), Chosen(0.005, 0.3, 0.4)
    assert percent.values == share.values
    assert [run.accuracy for run in percent.history.runs] == pytest.approx(
        [run.accuracy for run in share.history.runs]
    )
    assert vars(percent.history.selection) == pytest.approx(vars(share.history.selection))


def test_a_resumed_training_knows_the_unit():
    first, second = Chosen(30.0), Chosen()
    second.history.load_state_dict(first.history.state_dict())
    second.judged(1, 0.5)
    assert second.history.runs[-1].accuracy == pytest.approx(0.005)
