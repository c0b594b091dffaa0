import pytest
import torch

from sess_lightning.callback.tables import class_rows, sample_row, standing_out, wilson
from sess_lightning.metrics.sess_metric import NO_TRIAL, Samples

NAN = torch.nan
SAMPLES = Samples(
    numbers=torch.arange(5),
    targets=torch.tensor([3, 1, 3, 1, 2]),
    predicted=torch.tensor([3, 1, 0, 1, 2]),
    scores=torch.tensor([0.9, 0.8, 0.1, 0.7, 0.6]),
    insertion=torch.tensor([0.5, 0.75, 0.25, 0.5, NAN]),
    deletion=torch.tensor([0.25, 0.25, 0.5, 0.25, NAN]),
    hits=torch.tensor([1, 1, 0, 1, NO_TRIAL]),
    mass=torch.tensor([0.5, 0.25, 0.25, 0.75, NAN]),
    share=torch.tensor([0.25, 0.25, 0.25, 0.25, NAN]),
    small=torch.zeros(5, 0, 0),
    flat=torch.zeros(5, dtype=torch.int64),
    digests=torch.zeros(5, dtype=torch.int64),
)
DRIFTS = {"drift_previous": torch.tensor([0.9, 0.2, NAN, 0.5, 1]), "drift_initial": torch.zeros(5)}


def name(index):
    return f"class {index:.0f}"


def test_classes_come_worst_first_with_their_trials_and_intervals():
    worst, best = class_rows(SAMPLES, name)
    assert (worst["class"], worst["trials"], worst["hits"], worst["pointing_game"]) == ("class 3", 2, 1, 0.5)
    assert (best["class"], best["pointing_game"], best["relevance_mass"]) == ("class 1", 1.0, 0.5)
    assert (worst["ci_low"], worst["ci_high"]) == wilson(1, 2)
    assert worst["region_share"] == 0.25


def test_no_more_than_a_hundred_classes_are_told():
    many = SAMPLES._replace(**{field: each.repeat(60) for field, each in SAMPLES._asdict().items()
                               if each.ndim == 1}, small=torch.zeros(300, 0, 0))  # fmt: skip
    many = many._replace(targets=torch.arange(300))
    assert len(class_rows(many, name)) == 100


def test_wilsons_interval_stays_in_0_to_1_and_is_never_empty():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == pytest.approx(0)
    assert wilson(5, 5)[0] == pytest.approx(0.5655, abs=1e-4)


def test_worst_explained_and_most_drifted_samples_stand_out():
    assert standing_out(SAMPLES, DRIFTS, 2) == [
        ("worst explained", 2), ("worst explained", 0), ("most drifted", 1), ("most drifted", 3),
    ]  # fmt: skip
    assert [i for _, i in standing_out(SAMPLES, {}, 9)] == [2, 0, 3, 1]
    assert standing_out(SAMPLES, DRIFTS, 0) == []


def test_a_row_tells_what_is_known_of_a_sample_and_none_where_nothing_is():
    assert sample_row(SAMPLES, DRIFTS, 2, name) == {
        "target": "class 3", "prediction": "class 0", "score": pytest.approx(0.1), "overall": -0.25,
        "insertion": 0.25, "deletion": 0.5, "pointing_game": "miss", "relevance_mass": 0.25,
        "drift_previous": None, "drift_initial": 0.0,
    }  # fmt: skip
    row = sample_row(SAMPLES, {}, 4, name)
    assert [row[key] for key in ("overall", "pointing_game", "relevance_mass", "drift_initial")] == [None] * 4
