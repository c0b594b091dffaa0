import csv
from itertools import count

import pytest
import torch
from torch import nn

from formula import picture
from lightning_models import filled_net, small_net
from sess_lightning import SESS, SESSCallback, cli, commands
from sess_lightning.cost.measure import CURVES, RATIOS, SAMPLES, SCALES, SHARES, UPDATE, measure_cost
from sess_lightning.cost.measuring import alternate, peak_bytes
from sess_lightning.evaluation.weights import Network
from sess_lightning.methods import GradCAM, GuidedBackprop

SIZE = (32, 32)


class Small(nn.Module):
    def __init__(self, classes: int = 4):
        super().__init__()
        self.layers = small_net(classes)

    def forward(self, images):
        return self.layers(images)


METHOD = SESS(GradCAM(), num_scales=2)


@pytest.fixture(scope="module")
def images():
    return picture(*SIZE, 1)[None]


@pytest.fixture(scope="module")
def costs(images):
    """Of two images at once, told per image."""
    return measure_cost(
        filled_net(), torch.cat([images, images]), METHOD, num_samples=16, max_forwards=2500, rounds=2
    )


def by_name(rows):
    return {row.name: row for row in rows}


def test_forwards_are_counted_windows_one_map_56_and_54_more_and_the_base_is_the_first_window(costs):
    counted = {part.name: part.forwards for part in costs.parts}
    assert counted == {str(METHOD): 5, "GradCAM(), alone": 1, CURVES: 56, UPDATE: 5 + 56 + 54}


def test_knobs_tell_the_forwards_of_every_setting(costs):
    knobs = by_name(costs.knobs)
    assert [knobs[f"num_scales={n}"].forwards for n in SCALES] == [
        1, 5, 9, 13, 22, 31, 40, 49, 65, 81, 97, 122,
    ]  # fmt: skip
    assert {knobs[f"prefilter_ratio={r}"].forwards for r in RATIOS} == {5}  # One forward scores and explains.
    assert [knobs[f"coarse_to_fine={share}"].forwards for share in SHARES] == [2, 2]  # Of 1 + 4.
    assert knobs["coarse_to_fine=0.3"].seconds == pytest.approx(2 / 5 * costs.parts[0].seconds)
    assert {f"num_samples={n}" for n in SAMPLES} < knobs.keys()
    assert knobs["num_scales=2"].run_seconds == costs.run.run_seconds
    assert knobs["num_scales=6"].seconds == pytest.approx(31 / 5 * costs.parts[0].seconds)


def test_a_run_is_the_callbacks(costs):
    budget = SESSCallback(METHOD, num_samples=16, max_forwards=2500).budget(filled_net(), SIZE)
    assert (costs.run.samples, costs.run.run_forwards) == (budget.samples, budget.forwards)
    parts = by_name(costs.parts)
    controls = budget.controls * 2 * 54 * parts[CURVES].seconds / 56
    assert costs.run.run_seconds == pytest.approx(budget.samples * parts[UPDATE].seconds + controls)


def test_a_filter_saves_what_comes_after_the_score(images):
    method = SESS(GuidedBackprop(), num_scales=3)
    costs = measure_cost(filled_net(), images, method, max_forwards=600, rounds=3)
    own, knobs = costs.parts[0], by_name(costs.knobs)
    assert own.forwards == 18  # Nine score, nine explain.
    assert own.lowest <= own.ratio <= own.highest
    assert own.peak > own.bare_peak > 0
    filtered = [knobs[f"prefilter_ratio={r}"] for r in RATIOS]
    assert [knob.forwards for knob in filtered] == [18, 14, 10, 10]
    assert [knobs[f"coarse_to_fine={share}"].forwards for share in SHARES] == [3 + 3, 4 + 4]
    assert filtered[0].seconds == pytest.approx(own.seconds)
    assert filtered[1].seconds < own.seconds
    # What max_forwards does not pay for is told as no sample.
    assert (costs.run.samples, knobs["num_scales=12"].samples) == (1, 0)


def test_a_method_without_a_base_has_no_scales_to_turn_and_the_model_is_given_back(images):
    model = small_net()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    costs = measure_cost(model, images, GradCAM(), rounds=1)
    assert [part.name for part in costs.parts] == ["GradCAM()", CURVES, UPDATE]
    assert [knob.name for knob in costs.knobs] == ["", *(f"num_samples={n}" for n in SAMPLES)]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_hook_goes_when_the_model_fails(images):
    model = filled_net()
    model.append(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        measure_cost(model, images)
    assert not model._forward_pre_hooks


def test_the_table_and_the_file_hold_every_row(costs, tmp_path):
    lines = costs.table().splitlines()
    names = [row.name or "as set" for row in (*costs.parts, *costs.knobs)]
    assert all(sum(line.startswith(name + " ") for line in lines) == 1 for name in names)
    assert "method: SESS(GradCAM(), num_scales=2)" in lines
    costs.to_csv(tmp_path / "costs.csv")
    with (tmp_path / "costs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["name"]) for row in rows] == [
        *(("part", part.name) for part in costs.parts),
        *(("knob", knob.name) for knob in costs.knobs),
    ]
    assert float(rows[0]["ratio"]) == costs.parts[0].ratio
    assert {row["threads"] for row in rows} == {str(torch.get_num_threads())}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"max_forwards": 99}, "max_forwards=99 does not pay for a single sample"),
        ({"images": torch.zeros(3, 32, 32)}, r"use images\[None\] for a single image"),
        ({"targets": torch.tensor([0, 1])}, "targets must have shape"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_runs(images, unchecked, wrong, message):
    model, seen = filled_net(), []
    model.register_forward_pre_hook(lambda *call: seen.append(call))
    with pytest.raises(ValueError, match=message):
        measure_cost(model, **({"images": images} | wrong))
    assert not seen


def test_rounds_go_to_and_fro():
    order = []
    ticks = count(0.0)
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = alternate(runs, 3, clock=lambda: next(ticks))
    assert "".join(order) == "abccbaabc"
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1], "c": [1, 1, 1]}


def test_peak_bytes_are_those_alive_at_a_time():
    given = torch.zeros(10_000)

    def run():
        one = torch.zeros(1000)
        view, other = one.view(10, 100), given[:5]  # Neither makes anything.
        del one, other
        two = view + 1
        del view
        return two * 2, given.sum()

    assert peak_bytes(run) == 2 * 4000 + 4


def test_cost_measures_a_class_of_ones_own(capsys, tmp_path):
    out = tmp_path / "new" / "costs.csv"
    given = ["--module", f"{__name__}.Small", "--module.classes", "3", "--size", "32", "40", "--rounds", "1"]
    cli.main(["cost", *given, "--method", "GradCAM", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "model: Small, 1,459 parameters" in printed
    assert "images: (1, 3, 32, 40), float32" in printed
    assert "SESSMetric.update" in printed
    assert len(out.read_text().splitlines()) == 1 + 3 + 1 + len(SAMPLES)


def test_cost_takes_a_network_by_name_and_a_method(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        commands, "_network", lambda config: asked.append(config.model.name) or Network(filled_net(), (), ())
    )
    base = '{"class_path": "sess_lightning.methods.GuidedBackprop"}'
    method = ["--method", "SESS", "--method.base", base, "--method.num_scales", "1"]
    cli.main(["cost", "--model.name", "vgg16", "--size", "32", "--rounds", "1", "--fold", "true", *method])
    printed = capsys.readouterr().out
    assert "SESS(GuidedBackprop(), num_scales=1) " in printed
    assert "Sequential, 1,460 parameters" in printed  # The folded norm had 16.
    assert asked == ["vgg16"]


def test_cost_refuses_a_size_of_three_numbers(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["cost", "--size", "1", "2", "3"])
    assert "--size: one side, or height and width, got [1, 2, 3]" in capsys.readouterr().err
