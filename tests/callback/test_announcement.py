import re

import pytest

from callbacks import QUICK, Apart, numbers
from lightning_models import (
    boxed,
    fit,
    squares,
    validate,
)
from sess_lightning import SESSCallback
from sess_lightning.methods import GradCAM


@pytest.mark.usefixtures("whole_curves")
@pytest.mark.parametrize(("target", "samples"), [("label", 32), ("predicted", 32)])
def test_a_run_costs_the_forwards_that_are_announced_and_at_most_5000(
    tmp_path, monkeypatch, told, target, samples
):
    monkeypatch.setattr(Apart, "images", 0)
    callback = SESSCallback(on_error="raise", target=target)
    validate(tmp_path, callback, module=Apart, val=squares(40, batch_size=8, size=64, side=20))
    line, _ = told()
    announced = int(re.search(r"at most ([\d,]+) forward passes", line)[1].replace(",", ""))
    assert f"explains {samples} samples of 64x64 px with SESS(GradCAM()), 31 forward passes per map" in line
    assert 2500 <= announced <= 5000
    assert announced - 2 <= Apart.images <= announced


def test_a_small_budget_is_kept_and_floors_are_scored_on_at_least_four(tmp_path, monkeypatch, told):
    monkeypatch.setattr(Apart, "images", 0)
    callback = SESSCallback(QUICK, on_error="raise", max_forwards=1000)
    its = validate(tmp_path, callback, module=Apart, val=squares())
    values = numbers(its.callback_metrics)
    # 115 an image: two ends, 5 windows, the first of them the base's, two maps' 54; 108 more for both floors.
    assert (values["sess/n"], values["sess/random/curves_n"], values["sess/centre/curves_n"]) == (4, 4, 4)
    assert Apart.images <= 895
    assert (
        "at most 895 forward passes per run; 4 of the 32 samples asked for, as max_forwards=1000 pays"
        in told()[0]
    )


def test_a_budget_that_pays_for_nothing_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"max_forwards=400 does not pay for a single sample, which costs 115"
    ):
        validate(tmp_path, SESSCallback(QUICK, on_error="raise", max_forwards=400))


def test_what_will_be_done_is_said_once_in_one_line(tmp_path, told):
    fit(tmp_path, SESSCallback(QUICK, num_samples=4), max_epochs=2, val=squares(read=boxed))
    line, cost = told()
    assert cost == "SESSCallback: a run takes 0.0 s."
    assert "\n" not in line
    for part in (
        "each run explains 4 samples of 32x32 px with SESS(GradCAM(), num_scales=2)",
        "5 forward passes per map",
        "compared with Grad-CAM (4), random (4), centre (4)",
        "Pointing Game within 2.14 px",
        "at most 895 forward passes per run",
        f"pictures: none; report: {tmp_path / 'sess' / 'report.html'}.",
    ):
        assert part in line
    assert "asked for" not in line


def test_a_run_that_compares_nothing_says_nothing_of_it(tmp_path, told):
    validate(tmp_path, SESSCallback(QUICK, num_samples=4, compare={}), val=squares(8))
    assert "5 forward passes per map; no boxes or masks" in told()[0]


def test_a_single_sample_and_a_single_pass_are_counted_as_such(tmp_path, told):
    validate(tmp_path, SESSCallback(GradCAM(), num_samples=1, compare={}), val=squares(8))
    assert "explains 1 sample of 32x32 px with GradCAM(), 1 forward pass per map" in told()[0]


def test_a_small_data_set_is_announced_with_the_samples_it_has(tmp_path, told):
    its = validate(tmp_path, SESSCallback(QUICK), val=squares(8))
    assert "explains 8 samples" in told()[0]
    assert "8 of the 32 samples asked for, as no more pass by" in told()[0]
    assert numbers(its.callback_metrics)["sess/n"] == 8
