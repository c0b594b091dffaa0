"""From rows to scores."""

import json
from pathlib import Path

import pytest
import torch

from sess_lightning import SESSMetric
from sess_lightning.jsonl import plain
from sess_lightning.methods import GradCAM, RandomMap
from sess_lightning.metrics.summary import in_order, mean_curves, sample_scores, samples, scores
from sess_lightning.scores import split

PINNED = json.loads((Path(__file__).parents[1] / "golden" / "summary.json").read_text())
NAMES = ["", "base", "plus plus"]


def rows(order=slice(None)):
    """The pinned rows as a metric holds them."""
    metric = SESSMetric(GradCAM(), compare={"base": GradCAM(), "plus plus": RandomMap()}, steps=4, grid=2)
    metric.load_rows(PINNED["rows"])
    return in_order({name: metric.rows(name)[order] for name in metric.states})


def test_scores_are_those_of_a_metric_with_a_state_per_method():
    found = scores(rows(), NAMES)
    tied = {name: value for name, value in found.items() if name.endswith("tied_share")}
    assert {name: value for name, value in found.items() if name not in tied} == pytest.approx(
        PINNED["values"], abs=1e-12
    )
    columns = torch.tensor(PINNED["rows"]["tied"], dtype=torch.float64).mean(0).tolist()
    keys = ("tied_share", "base/tied_share", "plus plus/tied_share")
    assert tied == pytest.approx(dict(zip(keys, columns, strict=True)))
    assert all(split(name) for name in found)


def test_mean_curves_and_samples_are_those_of_a_metric_with_a_state_per_method():
    found = mean_curves(rows(), NAMES)
    assert list(found) == NAMES
    for name, curve in found.items():
        torch.testing.assert_close(curve, torch.tensor(PINNED["curves"][name]))
    for name, column in samples(rows())._asdict().items():
        assert plain(column) == PINNED["samples"][name]


def test_images_may_come_in_any_order_and_keep_their_samples_together():
    begins = PINNED["rows"]["begins"]
    images = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9], [10, 11], [12], [13]]
    assert [begins[image[0]] for image in images] == [4, 1, 3, 2, 8, 6, 6, 5, 10]
    shuffled = [sample for image in images[::-1] for sample in image]
    first, other = rows(), rows(shuffled)
    assert first.numbers.tolist() == [0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5, 7, 7, 9]
    assert first.image_of.tolist() == [0, 1, 2, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8]
    assert other.numbers.tolist() == first.numbers.tolist()
    same = first.numbers != 5  # Two images of that number: which comes first, the rows' order says.
    assert torch.equal(first.mass[same].nan_to_num(-1), other.mass[same].nan_to_num(-1))


def test_sample_scores_have_the_means_that_the_scores_tell():
    found = scores(rows(), NAMES)
    for i, prefix in enumerate(("", "base/", "plus plus/")):
        table = sample_scores(rows(), i)
        assert table["overall"].nanmean().item() == pytest.approx(found[f"{prefix}overall"])
        assert table["relevance_mass"].nanmean().item() == pytest.approx(found[f"{prefix}relevance_mass"])
        assert table["tied_share"].mean().item() == pytest.approx(found[f"{prefix}tied_share"])
        assert table["flat"].sum().item() == found[f"{prefix}flat"]
        assert table["hit"].isfinite().sum().item() == found["pointing_game_n"]
        assert ("region_share" in table) == (i == 0)
    assert sample_scores(rows(), 0)["region_share"].nanmean().item() == pytest.approx(found["region_share"])


def test_no_rows_have_no_scores():
    metric = SESSMetric(GradCAM(), compare={})
    empty = in_order({name: metric.rows(name) for name in metric.states})
    assert scores(empty, [""]) == {}
    assert len(samples(empty).numbers) == 0
