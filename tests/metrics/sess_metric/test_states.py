"""States of SESSMetric: over processes, copies, errors, and refused input."""

import pickle
from functools import partial

import pytest
import torch
from torchmetrics import MetricCollection

from formula import picture
from lightning_models import filled_net, gathered
from scored import TARGETS, TWO_SCALES, Channel, run
from sess_lightning import SESSMetric
from sess_lightning.methods import GradCAM, RandomMap


def several(boxes, part=slice(0, 6), method=TWO_SCALES, numbered=True, **kwargs):
    """Explain three classes on each of some images."""
    metric, classes = SESSMetric(method, **kwargs), torch.tensor([0, 1, 2])
    for i in range(6)[part]:
        numbers = [i] if numbered else None
        metric.update(filled_net(), picture(32, 32, i)[None], classes, [boxes[i]] * 3, numbers=numbers)
    return metric


def test_trials_of_one_image_are_drawn_together(boxes):
    single = several(boxes, method=Channel(0), compare={"green": Channel(1)})
    several_times, apart = single.clone(), single.clone()
    first = {name: each[::3] for name, each in single.take_rows().items()}  # A class of each image.
    for metric in (several_times, apart):
        metric.reset()
    four_times = {name: each.repeat_interleave(4, 0) for name, each in first.items()}
    single.load_rows(first)
    several_times.load_rows({**four_times, "begins": torch.tensor([1, 0, 0, 0] * 6)})
    apart.load_rows({**four_times, "begins": torch.ones(24, dtype=torch.int64)})
    once, together, naive = (metric.compute() for metric in (single, several_times, apart))
    for name in ("insertion", "overall", "pointing_game", "green/deletion", "minus_green/overall"):
        ends = [f"{name}_ci_low", f"{name}_ci_high"]
        assert [together[end] for end in ends] == pytest.approx([once[end] for end in ends], abs=1e-12)
    width = {key: each["insertion_ci_high"] - each["insertion_ci_low"] for key, each in
             (("together", together), ("naive", naive))}  # fmt: skip
    assert width["together"] > 1.7 * width["naive"] > 0


def test_images_of_several_processes_and_merged_ones_do_not_collide(boxes):
    whole, first, last = several(boxes).compute(), slice(0, 4), slice(4, 6)
    assert gathered([several(boxes, last), several(boxes, first)]).compute() == whole
    merged = several(boxes, last)
    merged.merge_state(several(boxes, first))
    assert merged.compute() == whole


def test_images_of_equal_numbers_stay_apart_and_the_first_process_comes_first(boxes):
    parts = slice(0, 4), slice(4, 6)
    metric = gathered([several(boxes, part, numbered=False) for part in parts])
    assert metric.compute()["insertion"] == pytest.approx(several(boxes).compute()["insertion"], abs=1e-12)
    samples, order = metric.samples(), [0, 4, 1, 5, 2, 3]  # Each counts its rows: 0, 3, 6, 9 and 0, 3.
    assert samples.numbers.tolist() == [0] * 6 + [3] * 6 + [6] * 3 + [9] * 3
    assert samples.targets.tolist() == [0, 1, 2] * 6
    assert samples.scores[::3].tolist() == several(boxes).samples().scores[::3][order].tolist()


def test_rows_travel_from_one_metric_to_another(model, images, boxes):
    one, other = SESSMetric(TWO_SCALES), SESSMetric(TWO_SCALES)
    values = run(one, model, images, boxes)
    rows = one.take_rows()
    assert len(one.targets) == 0
    other.load_rows({name: each.tolist() for name, each in rows.items()})
    assert other.compute() == values
    with pytest.raises(ValueError, match=r"SESSMetric: rows must be those of \['begins', .*got \['hits'\]"):
        other.load_rows({"hits": rows["targets"]})


def test_intervals_are_reproducible_and_leave_the_global_generator_alone(model, images, boxes):
    before = torch.get_rng_state()
    metric = SESSMetric(TWO_SCALES, compare={"random": RandomMap()})
    first = run(metric, model, images, boxes)
    second = run(SESSMetric(TWO_SCALES, compare={"random": RandomMap()}), model, images, boxes)
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


def test_before_the_first_update_there_is_nothing_to_tell():
    metric = SESSMetric(TWO_SCALES)
    assert metric.compute() == {}


@pytest.mark.parametrize("limits", [None, {"base": 3}], ids=["", "limited"])
def test_forward_tells_of_the_batch_and_accumulates(limits, model, images, boxes):
    make = partial(SESSMetric, TWO_SCALES, limits=limits)
    metric, whole, parts = make(), make(), (slice(0, 2), slice(2, 6))
    for part in parts:
        alone = make()
        alone.update(model, images[part], TARGETS[part], boxes[part], numbers=range(6)[part])
        assert metric(model, images[part], TARGETS[part], boxes[part]) == alone.compute()
    assert metric.compute() == run(whole, model, images, boxes, parts)


def test_clone_pickle_and_reset(model, images, boxes):
    metric = SESSMetric(TWO_SCALES)
    values = run(metric, model, images, boxes)
    clone, pickled = metric.clone(), pickle.loads(pickle.dumps(metric))
    metric.reset()
    assert metric.latest == {}
    assert run(metric, model, images, boxes) == clone.compute() == pickled.compute() == values


def test_neither_the_model_nor_any_state_enters_a_checkpoint(model, images):
    metric = SESSMetric(TWO_SCALES)
    run(metric, model, images)
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == list(metric.buffers()) == []
    model.train()
    metric.eval()
    assert model.training


def test_updates_under_inference_mode_are_the_same(model, images, boxes):
    expected = run(SESSMetric(TWO_SCALES), model, images, boxes, (slice(0, 3), slice(3, 6)))
    metric = SESSMetric(TWO_SCALES)
    with torch.inference_mode():
        first = images[:3].clone()
        metric.update(model, first, TARGETS[:3].clone(), boxes[:3])
    metric.update(model, images[3:], TARGETS[3:], boxes[3:])
    assert metric.compute() == expected


APART = {
    "method": ({"method": Channel(0)}, {"method": Channel(1)}),
    "tolerance": ({"tolerance": 1.0}, {"tolerance": 40.0}),
    "limits": ({"compare": {"one": Channel(1)}, "limits": {"one": 2}}, {"compare": {"one": Channel(1)}}),
}


@pytest.mark.parametrize("forward", [False, True], ids=["update", "forward"])
@pytest.mark.parametrize("option", APART)
def test_a_collection_keeps_two_of_them_apart(option, forward, model, images, boxes):
    make = {
        name: partial(SESSMetric, **{"method": Channel(0), **options})
        for name, options in zip(("a", "b"), APART[option], strict=True)
    }
    collection, parts = (
        MetricCollection({name: made() for name, made in make.items()}),
        (slice(0, 1), slice(1, 6)),
    )
    for part in parts:
        (collection if forward else collection.update)(model, images[part], TARGETS[part], boxes[part])
    alone = {name: run(made(), model, images, boxes, parts) for name, made in make.items()}
    assert alone["a"] != alone["b"]
    assert collection.compute() == {
        f"{name}_{figure}": value for name, values in alone.items() for figure, value in values.items()
    }


def test_two_processes_states_merge_into_that_of_one(model, images, boxes):
    whole = run(SESSMetric(TWO_SCALES), model, images, boxes)
    one, other = SESSMetric(TWO_SCALES), SESSMetric(TWO_SCALES)
    one.update(model, images[4:], TARGETS[4:], boxes[4:], numbers=[4, 5])
    other.update(model, images[:4], TARGETS[:4], boxes[:4])
    one.merge_state(other)
    assert one.compute() == pytest.approx(whole, abs=1e-6)


def test_uneven_processes_are_gathered_also_where_one_saw_no_sample(model, images, boxes):
    processes = [SESSMetric(TWO_SCALES) for _ in range(3)]
    processes[1].update(model, images[:4], TARGETS[:4], boxes[:4])
    processes[2].update(model, images[4:], TARGETS[4:], boxes[4:], numbers=[4, 5])
    metric, whole = gathered(processes), SESSMetric(TWO_SCALES)
    assert metric.compute() == pytest.approx(run(whole, model, images, boxes), abs=1e-6)
    for name, curves in whole.curves().items():
        torch.testing.assert_close(metric.curves()[name], curves, atol=1e-6, rtol=0)
    assert len(metric.targets) == 0  # Its own state is back.


def test_a_summary_is_all_that_is_told_at_the_price_of_one_gathering(model, images, boxes):
    processes, asked = [SESSMetric(TWO_SCALES, grid=4) for _ in range(2)], []
    processes[0].update(model, images[:4], TARGETS[:4], boxes[:4])
    processes[1].update(model, images[4:], TARGETS[4:], boxes[4:], numbers=[4, 5])
    metric = gathered(processes)
    answer = metric.dist_sync_fn
    metric.dist_sync_fn = lambda tensor, group: asked.append(tensor) or answer(tensor, group)
    summary, whole = metric.summary(), len(asked)
    assert summary.values == metric.compute()
    assert len(asked) == 2 * whole > 0
    for name, curves in metric.curves().items():
        torch.testing.assert_close(summary.curves[name], curves, equal_nan=True)
    torch.testing.assert_close(summary.samples, metric.samples(), equal_nan=True)


def test_a_summary_that_fails_gives_the_process_its_own_rows_back(model, images, monkeypatch):
    processes = [SESSMetric(TWO_SCALES) for _ in range(2)]
    for process in processes:
        process.update(model, images[:2], TARGETS[:2])
    metric = gathered(processes)
    monkeypatch.setattr(metric, "_rows", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        metric.summary()
    assert [len(each) for each in metric.targets] == [2]
    metric.reset()
    assert metric.targets == []


def test_the_model_is_given_back_as_it_was(images):
    model = filled_net().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    run(SESSMetric(TWO_SCALES), model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_method_without_a_base_is_compared_with_nothing():
    assert list(SESSMetric(GradCAM()).methods) == [""]
    assert list(SESSMetric(TWO_SCALES, compare={}).methods) == [""]


def test_what_is_no_method_is_refused(unchecked):
    with pytest.raises(
        TypeError, match=r"method must be a saliency method such as SESS\(GradCAM\(\)\), got 'sess'"
    ):
        SESSMetric("sess")
    with pytest.raises(ValueError, match="a method cannot be called ''"):
        SESSMetric(TWO_SCALES, compare={"": GradCAM()})
    with pytest.raises(ValueError, match="'minus_blur': \"minus_\" begins the keys of differences"):
        SESSMetric(TWO_SCALES, compare={"minus_blur": GradCAM()})
    with pytest.raises(
        ValueError, match="cannot be told apart from 'SESS', the name of the explained method"
    ):
        SESSMetric(TWO_SCALES, compare={"SESS": GradCAM()})


def test_an_update_that_fails_leaves_no_row_behind(model, images, monkeypatch):
    metric = SESSMetric(TWO_SCALES)
    run(metric, model, images)
    monkeypatch.setattr(
        "sess_lightning.metrics.sess_metric.insertion_and_deletion_curves", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        metric.update(model, images, TARGETS)
    assert {name: len(metric.rows(name)) for name in metric.states} == dict.fromkeys(metric.states, 6)


def test_what_is_compared_is_methods_by_names(unchecked):
    with pytest.raises(TypeError, match=r"compare must be a dict of methods by name, such as .* got list"):
        SESSMetric(Channel(0), compare=[Channel(1)])
    with pytest.raises(
        TypeError, match=r"cam must be a saliency method such as SESS\(GradCAM\(\)\), got <class"
    ):
        SESSMetric(Channel(0), compare={"cam": Channel})


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"images": torch.zeros(3, 32, 32)}, ValueError, r"images must be \(B, C, H, W\), got \(3, 32, 32\)"),
        ({"images": torch.zeros(0, 3, 32, 32)}, ValueError, "images is empty"),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, ValueError, "images hold NaN"),
        (
            {"images": torch.zeros(2, 1, 32, 32)},
            ValueError,
            "images have 1 channels, which the model does not take",
        ),
        ({"targets": torch.tensor([0, 4])}, ValueError, r"targets must be class indices in 0\.\.3"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets must be an integer tensor"),
        ({"regions": [torch.zeros(1, 4)]}, ValueError, "regions: got 1 for 2 maps"),
    ],
)
def test_bad_input_is_named(change, error, names, model, images, unchecked):
    given = {"images": images[:2], "targets": TARGETS[:2], "regions": None} | change
    with pytest.raises(error, match=names):
        SESSMetric(Channel(0)).update(model, given["images"], given["targets"], given["regions"])
