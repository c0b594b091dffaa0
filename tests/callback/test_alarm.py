from dataclasses import replace

import pytest
import torch

from sess_lightning.callback.accuracy import find_accuracy, is_accuracy, is_error, is_percent
from sess_lightning.callback.alarm import LEAST_SAMPLES, describe, findings
from sess_lightning.callback.runs import Run, constant_guess, drift, record, remembered
from sess_lightning.metrics.sess_metric import NO_TRIAL, Samples

N = 24
SHARE = 0.2


def noise(seed):
    return 0.02 * torch.randn(N, generator=torch.Generator().manual_seed(seed))


def run(step, accuracy, mass, overall=0.5, hits=1.0, seed=0):
    """A run whose figures scatter a little over the samples."""
    figures = {
        "relevance_mass": mass + noise(seed),
        "pointing_game": (torch.arange(N) < hits * N).float(),
        "overall": overall + noise(seed + 1),
        "region_share": torch.full((N,), SHARE),
        "right": torch.ones(N),
        "flat": torch.zeros(N),
    }
    small = torch.rand(N, 4, 4, generator=torch.Generator().manual_seed(seed)).half()
    return Run(step // 10, step, tuple(range(N)), figures, small, accuracy, guess=0.1)


def told(runs, now):
    return [(each.figure, each.since and each.since.step) for each in findings(runs, now)]


def test_accuracy_that_rises_while_the_maps_leave_the_object_rings():
    assert told([run(0, 0.6, 0.5)], run(10, 0.9, 0.3)) == [("relevance_mass", 0)]
    assert told([run(0, 0.6, 0.5, hits=1)], run(10, 0.9, 0.5, hits=0.5)) == [("pointing_game", 0)]
    assert told([run(0, 0.6, 0.5, overall=0.5)], run(10, 0.9, 0.5, overall=0.3)) == [("overall", 0)]


def test_it_is_silent_while_maps_and_accuracy_rise_or_fall_together():
    assert told([run(0, 0.6, 0.3)], run(10, 0.9, 0.5)) == []
    assert told([run(0, 0.9, 0.5)], run(10, 0.6, 0.3)) == []
    assert told([run(0, 0.895, 0.5)], run(10, 0.9, 0.3)) == []  # Less than two points are no rise.
    assert told([run(0, float("nan"), 0.5)], run(10, 0.9, 0.3)) == []


def test_a_fall_within_the_interval_or_less_than_five_points_is_none():
    assert told([run(0, 0.6, 0.50)], run(10, 0.9, 0.46)) == []
    wild = run(10, 0.9, 0.4)
    spread = torch.where(torch.arange(N) % 2 == 0, 0.9, -0.9)
    wild = replace(wild, figures={**wild.figures, "relevance_mass": 0.4 + spread})
    assert told([run(0, 0.6, 0.5)], wild) == []


def test_a_watermark_learnt_from_the_first_step_on_is_told_by_the_regions_share():
    assert told([], run(10, 0.99, 0.02)) == [("relevance_mass", None)]
    assert told([], run(10, 0.5, 0.02)) == []  # Not half way to 1 yet: such maps mean nothing.
    assert told([], run(10, 0.99, SHARE + 0.05)) == []


def test_the_best_earlier_run_of_lower_accuracy_is_the_one_compared_with():
    runs = [run(0, 0.2, 0.3), run(10, 0.6, 0.6), run(20, 0.95, 0.7)]
    (found,) = findings(runs, run(30, 0.9, 0.4))
    assert found.since.step == 10
    assert (found.before, found.now) == pytest.approx((0.6, 0.4), abs=0.02)
    assert found.low < -0.2 + 0.01
    assert found.high < 0
    assert found.samples == N


def test_runs_on_other_samples_are_not_compared():
    other = replace(run(0, 0.6, 0.5), samples=tuple(range(1, N + 1)))
    assert told([other], run(10, 0.9, 0.3)) == []
    assert remembered([other], run(10, 0.9, 0.3))[0].step == 10
    assert drift([other], run(10, 0.9, 0.3)) == {}


def test_few_samples_and_missing_figures_say_nothing():
    before, now = run(0, 0.6, 0.5), run(10, 0.9, 0.3)
    mostly = torch.where(torch.arange(N) < 7, now.figures["relevance_mass"], torch.nan)
    assert told([before], replace(now, figures={**now.figures, "relevance_mass": mostly})) == []


def marked(run, **columns):
    """A run of which the first ``n`` samples are flat, or wrong."""
    values = {"flat": (torch.zeros(N), 1.0), "wrong": (torch.ones(N), 0.0)}
    figures = dict(run.figures)
    for name, count in columns.items():
        column, value = values[name]
        column[:count] = value
        figures["right" if name == "wrong" else name] = column
    return replace(run, figures=figures)


def test_flat_maps_and_wrong_samples_do_not_ring_it():
    before, now = run(0, 0.6, 0.5), run(10, 0.9, 0.55)
    now.figures["relevance_mass"][:12] = 0  # Flat maps hold nothing: on the others mass rose.
    assert told([before], now) == [("relevance_mass", 0)]
    for marks in ({"flat": 12}, {"wrong": 12}, {"flat": 12, "wrong": 12}):
        assert told([before], marked(now, **marks)) == []
        assert told([marked(before, **marks)], now) == []  # In both runs.
    beside = run(10, 0.99, SHARE + 0.05)
    beside.figures["relevance_mass"][:12] = 0
    assert told([], beside) == [("relevance_mass", None)]
    assert told([], marked(beside, flat=12)) == []


def test_what_is_compared_is_right_and_not_flat_and_told_are_those_left_aside():
    before, now = marked(run(0, 0.6, 0.5), flat=3), marked(run(10, 0.9, 0.3), flat=2, wrong=1)
    (found,) = findings([before], now)
    assert (found.samples, found.flat) == (N - 3, 2)  # One of the flat ones is wrong as well.
    assert min(found.worst) >= 3
    text = describe([found], now, "val_acc", [str(i) for i in range(N)])
    assert f"{N - 3} samples classified right, 2 flat maps aside" in text


def test_it_is_silent_below_the_stated_number_of_samples():
    before, now = run(0, 0.6, 0.5), run(10, 0.9, 0.3)
    for column in ("flat", "wrong"):
        assert told([before], marked(now, **{column: N - LEAST_SAMPLES})) == [("relevance_mass", 0)]
        assert told([before], marked(now, **{column: N - LEAST_SAMPLES + 1})) == []


def test_runs_of_a_version_that_did_not_note_what_was_right_ring_nothing():
    before = run(0, 0.6, 0.5)
    for name in ("right", "flat"):
        del before.figures[name]
    assert told([before], run(10, 0.9, 0.3)) == []


def test_the_alarm_names_accuracy_figure_interval_and_the_worst_samples():
    before, now = run(0, 0.6, 0.5), run(10, 0.9, 0.3)
    now.figures["relevance_mass"][7] = 0.0
    text = describe(findings([before], now), now, "val_acc", [f"picture {i}" for i in range(N)])
    assert "val_acc is 0.900 at step 10" in text
    assert "relevance mass fell from 0.5" in text
    assert "(step 0, val_acc 0.600)" in text
    assert "99% interval" in text
    assert "Look at: picture 7, " in text
    beside = run(10, 0.99, 0.02)
    text = describe(findings([], beside), beside, "val_acc", [str(i) for i in range(N)])
    assert "less than the 0.200 of a map without preference" in text


def test_what_is_remembered_stays_small_the_first_the_best_and_the_newest():
    runs = []
    for step in range(0, 500, 10):
        runs = remembered(runs, run(step, 0.5, 0.3 + (step == 120) * 0.3, hits=0.5 + 0.25 * (step == 40)))
        assert len(runs) <= 5
    assert {0, 40, 120, 490} <= {each.step for each in runs}
    assert runs[0].step == 0
    assert runs[-1].step == 490


def test_drift_compares_with_the_previous_and_the_first_run():
    first, second, third = (run(step, 0.5, 0.3, seed=seed) for step, seed in ((0, 0), (10, 1), (20, 1)))
    found = drift([first, second], third)
    assert found["drift_previous"].tolist() == pytest.approx([1.0] * N)
    assert found["drift_initial"].abs().mean() < 0.5
    assert drift([], first) == {}


def test_a_record_holds_what_the_samples_show():
    hits = torch.tensor([1, 0, NO_TRIAL])
    three = torch.tensor([0.5, 0.25, torch.nan])
    predicted, flat = torch.tensor([1, 1, NO_TRIAL]), torch.tensor([1, 0, 0])
    small = torch.ones(3, 2, 2)
    samples = Samples(hits, hits, predicted, three, three, three / 2, hits, three, three, small, flat, flat)
    kept = record({"epoch": 2, "step": 30}, samples)
    assert (kept.epoch, kept.step, kept.samples) == (2, 30, (1, 0, 0, 1, 0, NO_TRIAL))
    assert record({"epoch": 2, "step": 30}, samples, predicted=True).samples == (1, 0, 0)
    assert kept.guess == pytest.approx(1 / 3)
    assert kept.figures["pointing_game"].isnan().tolist() == [False, False, True]
    assert kept.mean("pointing_game") == 0.5
    assert kept.figures["overall"][:2].tolist() == [0.25, 0.125]
    assert kept.is_right.tolist() == [True, False, True]
    assert kept.is_flat.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["val_loss", "train_acc", "val_acc", "sess/accuracy"], "val_acc"),
        (["val/MulticlassAccuracy", "val/acc"], "val/acc"),
        (["valid_top1", "loss"], "valid_top1"),
        (["val_MulticlassAccuracy", "val_loss"], "val_MulticlassAccuracy"),
        (["val_loss", "vacc", "train/accuracy"], None),
        (["val_err", "error_rate", "val_loss"], None),
        (["top1_error", "acc_loss", "val/misclassified_acc", "inaccuracy"], None),
        (["val_acc_error", "epoch_acc"], "epoch_acc"),
    ],
)
def test_accuracy_is_found_by_name(keys, expected):
    assert find_accuracy(dict.fromkeys(keys, 0.0), "sess") == expected


@pytest.mark.parametrize(
    ("loader", "named", "expected"),
    [
        (0, "", "acc/dataloader_idx_0"),
        (1, "", "val_acc/dataloader_idx_1"),
        (2, "", "whole_acc"),
        (0, "val_acc", "val_acc/dataloader_idx_0"),
        (1, "val_acc", "val_acc/dataloader_idx_1"),
        (2, "val_acc", None),
        (1, "acc/dataloader_idx_0", "acc/dataloader_idx_0"),
        (1, "whole_acc", "whole_acc"),
    ],
)
def test_of_several_loaders_the_watched_ones_accuracy_is_read(loader, named, expected):
    keys = ["acc/dataloader_idx_0", "val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1", "whole_acc"]
    if named == "" and loader == 0:
        keys.remove("val_acc/dataloader_idx_0")
    assert find_accuracy(dict.fromkeys(keys, 0.0), "sess", loader, named) == expected


def test_a_name_is_an_accuracys_or_an_errors():
    assert all(map(is_accuracy, ["acc", "val/top1", "MulticlassAccuracy"]))
    assert all(map(is_error, ["val_err", "error_rate", "loss", "top1_errors", "misclassified"]))
    assert not any(map(is_error, ["terrific_score", "val_acc_without_errors", "f1"]))


def test_what_is_above_1_and_not_above_100_is_in_percent():
    assert [is_percent(value) for value in (0.5, 1.0, 1.00001, 1.5, 96.0, 100.0, 101.0)] == [
        False, False, False, True, True, True, False,
    ]  # fmt: skip


def test_a_constant_guess_is_the_most_frequent_class():
    assert constant_guess([1, 1, 2, 3]) == 0.5
