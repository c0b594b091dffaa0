import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from formula import picture
from lightning_models import filled_net, gathered
from sess_lightning.metrics import Deletion, Insertion, PointingGame
from sess_lightning.metrics.functional import curve_auc, deletion_curve, insertion_curve

AGGREGATE = json.loads((Path(__file__).parents[1] / "golden" / "pointing_aggregate.json").read_text())


@pytest.fixture
def model():
    return filled_net()


@pytest.fixture
def images():
    return torch.stack([picture(32, 32, i) for i in range(5)])


@pytest.fixture
def maps(images):
    return images.mean(1)


TARGETS = torch.tensor([0, 1, 2, 3, 1])
FAITHFULNESS = [(Insertion, insertion_curve), (Deletion, deletion_curve)]


@pytest.mark.parametrize(("metric_class", "curve"), FAITHFULNESS)
def test_the_metric_is_the_mean_of_its_function(metric_class, curve, model, images, maps):
    metric = metric_class()
    metric.update(model, images[:2], maps[:2], TARGETS[:2])
    metric.update(model, images[2:], maps[2:], TARGETS[2:])
    expected = curve(model, images, maps, TARGETS)
    torch.testing.assert_close(metric.curves, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(metric.compute(), curve_auc(expected).mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("metric_class", "curve"), FAITHFULNESS)
def test_the_metrics_options_are_those_of_its_function(metric_class, curve, model, images, maps):
    flat, baseline = torch.zeros_like(maps), torch.ones_like(images)
    metric = metric_class(steps=5, ties="random", activation="sigmoid", batch_size=3)
    metric.update(model, images, flat, TARGETS, baseline)
    expected = curve(
        model,
        images,
        flat,
        TARGETS,
        steps=5,
        ties="random",
        activation="sigmoid",
        batch_size=3,
        baseline=baseline,
    )
    assert torch.equal(metric.curves, expected)


def test_insertion_is_to_be_high_and_deletion_low():
    assert (Insertion.higher_is_better, Deletion.higher_is_better) == (True, False)


@pytest.mark.parametrize("metric_class", [Insertion, Deletion])
def test_before_the_first_update_the_metric_is_nan(metric_class):
    metric = metric_class(steps=4)
    assert metric.curves.shape == (0, 5)
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert metric.compute().isnan().item()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Insertion(), Deletion()),
        (Insertion(steps=4), Insertion(steps=4, ties="random")),
        (Deletion(), Deletion(activation="sigmoid")),
    ],
    ids=["kind", "ties", "activation"],
)
@pytest.mark.parametrize("forward", [False, True], ids=["update", "forward"])
def test_a_collection_keeps_faithfulness_metrics_apart(one, other, forward, model, images, maps):
    together = MetricCollection({"one": one.clone(), "other": other.clone()})
    for part in (slice(0, 2), slice(2, 5)):
        given = model, images[part], maps[part], TARGETS[part]
        (together if forward else together.update)(*given)
    alone = {"one": one.clone(), "other": other.clone()}
    for metric in alone.values():
        metric.update(model, images, maps, TARGETS[:5])
    torch.testing.assert_close(together.compute(), {name: metric.compute() for name, metric in alone.items()})


@pytest.mark.parametrize("forward", [False, True], ids=["update", "forward"])
def test_a_collection_keeps_pointing_games_of_other_tolerance_apart(forward):
    def make():
        return {"tight": PointingGame(4, tolerance=1.0), "wide": PointingGame(4, tolerance=15.0)}

    together, alone = MetricCollection(make()), make()
    for x in (2, 12):  # Inside the box first, then 8 px beside it.
        maps = torch.zeros(1, 32, 32)
        maps[0, 2, x] = 1
        batch = maps, [torch.tensor([[0.0, 0, 4, 4]])], TARGETS[:1]
        (together if forward else together.update)(*batch)
        for metric in alone.values():
            metric.update(*batch)
    assert together.compute() == {name: metric.compute() for name, metric in alone.items()}
    assert together["tight"].compute() == 0.5
    assert together["wide"].compute() == 1


def pointing_batches():
    maps = torch.zeros(4, 40, 40)
    for each, (x, y) in zip(maps, [(5, 5), (5, 5), (35, 35), (20, 20)], strict=True):
        each[y, x] = 1
    box = torch.tensor([[0.0, 0, 4, 4]])
    return [(maps[:1], [box], TARGETS[:1]), (maps[1:], [box, box, torch.zeros(0, 4)], TARGETS[1:4])]


def curve_batches(images, maps):
    model = filled_net()
    return [(model, images[part], maps[part], TARGETS[part]) for part in (slice(0, 2), slice(2, 5))]


@pytest.fixture(params=["Insertion", "Deletion", "PointingGame"])
def case(request, images, maps):
    """How to make a metric, and two batches for it."""
    if request.param == "PointingGame":
        return partial(PointingGame, num_classes=4), pointing_batches()
    return {"Insertion": Insertion, "Deletion": Deletion}[request.param], curve_batches(images, maps)


def filled(metric, batches):
    for batch in batches:
        metric.update(*batch)
    return metric


def test_forward_gives_the_batchs_value_and_accumulates(case):
    make, batches = case
    metric = make()
    for batch in batches:
        torch.testing.assert_close(metric(*batch), filled(make(), [batch]).compute(), equal_nan=True)
    torch.testing.assert_close(metric.compute(), filled(make(), batches).compute())


def test_clones_and_pickles_carry_the_state_but_share_none(case):
    make, batches = case
    metric = filled(make(), batches[:1])
    clone, pickled = metric.clone(), pickle.loads(pickle.dumps(metric))
    value = metric.compute()
    metric.update(*batches[1])
    torch.testing.assert_close(clone.compute(), value)
    torch.testing.assert_close(pickled.compute(), value)
    assert pickled.update_count == clone.update_count == 1


def test_reset_forgets_everything(case):
    make, batches = case
    metric = make()
    value = filled(metric, batches).compute()
    metric.reset()
    assert metric.update_count == 0
    torch.testing.assert_close(filled(metric, batches).compute(), value)


def test_nothing_of_a_metric_enters_a_checkpoint(case):
    make, batches = case
    metric = filled(make(), batches)
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == []


def test_a_metric_filled_under_inference_mode_can_be_used_outside(case):
    make, batches = case
    metric = make()
    with torch.inference_mode():
        metric.update(*batches[0])
    metric.update(*batches[1])
    torch.testing.assert_close(metric.compute(), filled(make(), batches).compute())


def test_two_processes_states_merge_into_that_of_one(case):
    make, batches = case
    metric = filled(make(), batches[:1])
    metric.merge_state(filled(make(), batches[1:]))
    torch.testing.assert_close(metric.compute(), filled(make(), batches).compute())


def test_uneven_processes_are_gathered_also_where_one_saw_no_sample(case):
    make, batches = case
    processes = [make(), filled(make(), batches[:1]), filled(make(), batches[1:])]
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        value = gathered(processes).compute()
    torch.testing.assert_close(value, filled(make(), batches).compute())


def test_a_metrics_dtype_does_not_follow_the_module_it_is_attached_to(case):
    make, batches = case
    metric = make()
    nn.ModuleDict({"metric": metric}).to(torch.bfloat16)
    value = filled(metric, batches).compute()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, filled(make(), batches).compute())


@pytest.mark.parametrize(("unseen_as_zero", "figure"), [(False, "mean_over_seen"), (True, "torchray_mean")])
def test_the_pointing_game_adds_up_as_torchray_does(unseen_as_zero, figure):
    metric = PointingGame(AGGREGATE["num_classes"], unseen_as_zero=unseen_as_zero)
    for label, result in AGGREGATE["results"]:
        saliency = torch.zeros(1, 40, 40)
        saliency[0, 20, 20] = 1
        box = {1: [[20.0, 20, 21, 21]], -1: [[0.0, 0, 2, 2]], 0: []}[result]
        metric.update(saliency, [torch.tensor(box).reshape(-1, 4)], torch.tensor([label]))
    assert metric.compute().item() == pytest.approx(AGGREGATE[figure])
    assert metric.skipped.item() == sum(result == 0 for _, result in AGGREGATE["results"])
    seen = [0, 1, 2]
    assert metric.per_class()[seen].tolist() == pytest.approx([AGGREGATE["class_accuracy"][k] for k in seen])
    assert metric.per_class()[3].isnan().item()


def test_hits_misses_and_skipped_are_counted_per_class_in_int64():
    metric = filled(PointingGame(num_classes=4), pointing_batches())
    assert metric.hits.tolist() == [1, 1, 0, 0]
    assert metric.misses.tolist() == [0, 0, 1, 0]
    assert metric.skipped.item() == 1
    assert {metric.hits.dtype, metric.misses.dtype, metric.skipped.dtype} == {torch.int64}
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_counts_stay_exact_beyond_what_float32_can_tell_apart():
    metric = filled(PointingGame(num_classes=4), pointing_batches())
    metric.hits[0] = 2**24
    metric.update(*pointing_batches()[0])
    assert metric.hits[0].item() == 2**24 + 1


def test_a_trial_with_its_region_as_a_mask_counts_as_with_boxes():
    boxes, masks = PointingGame(2, tolerance=2.0), PointingGame(2, tolerance=2.0)
    saliency = torch.zeros(2, 8, 8)
    saliency[0, 2, 3] = saliency[1, 7, 7] = 1
    region = torch.zeros(2, 8, 8, dtype=torch.bool)
    region[:, 1:3, 2:4] = True
    targets = torch.tensor([0, 1])
    boxes.update(saliency, [torch.tensor([[2.0, 1, 4, 3]])] * 2, targets)
    masks.update(saliency, region, targets)
    assert boxes.hits.tolist() == masks.hits.tolist() == [1, 0]
    assert boxes.misses.tolist() == masks.misses.tolist() == [0, 1]


def test_the_pointing_game_is_played_at_the_size_the_boxes_refer_to():
    metric = PointingGame(1, tolerance=2.0)
    saliency = torch.zeros(1, 8, 8)
    saliency[0, 1, 6] = 1
    metric.update(saliency, [torch.tensor([[64.0, 7, 66, 9]])], torch.tensor([0]), size=(40, 80))
    assert metric.hits.tolist() == [1]


def test_without_a_trial_the_pointing_game_is_nan():
    metric = PointingGame(2)
    metric.update(torch.ones(1, 4, 4), [torch.zeros(0, 4)], torch.tensor([0]))
    assert metric.compute().isnan().item()
    assert metric.skipped.item() == 1


def test_the_pointing_game_refuses_to_have_no_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        PointingGame(0)


@pytest.mark.usefixtures("unchecked")
def test_the_pointing_game_names_what_is_no_tensor_and_the_remedy_works():
    maps, boxes, targets = torch.eye(8)[None], [torch.tensor([[0.0, 0, 4, 4]])], torch.tensor([0])
    game = PointingGame(1, tolerance=2.0)
    with pytest.raises(
        TypeError, match=r"maps must be a tensor, got ndarray; torch.as_tensor\(maps\) converts"
    ):
        game.update(maps.numpy(), boxes, targets)
    with pytest.raises(TypeError, match=r"targets must be a tensor, got list; torch.as_tensor\(targets\)"):
        game.update(maps, boxes, [0])
    with pytest.raises(TypeError, match="regions is None; pass masks, or boxes per image"):
        game.update(maps, None, targets)
    game.update(torch.as_tensor(maps.numpy()), boxes, torch.as_tensor([0]))
    assert game.compute() == 1


def test_a_class_that_the_pointing_game_does_not_have_is_refused():
    metric = PointingGame(2)
    with pytest.raises(ValueError, match=r"targets must be class indices in 0\.\.1, got \[2\]"):
        metric.update(torch.ones(1, 4, 4), [torch.ones(1, 4)], torch.tensor([2]))


def test_targets_that_are_not_one_per_map_are_refused(unchecked):
    for targets in (torch.tensor([0, 1]), torch.tensor([[0], [1], [2]]), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"PointingGame: targets must have shape \(3,\), one class"):
            PointingGame(4).update(torch.rand(3, 5, 5), torch.ones(3, 5, 5).bool(), targets)
