"""What people do with torchmetrics' Metrics: plots, wrappers, types of states."""

import matplotlib as mpl
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.wrappers import ClasswiseWrapper, MetricTracker, MinMaxMetric

from sess_lightning.methods import SESS, GradCAM
from sess_lightning.metrics import (
    Deletion,
    Insertion,
    InsertionDeletion,
    PointingGame,
    SESSMetric,
    SingleScore,
)

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.fixture
def maps(tiny, images, targets):
    return GradCAM()(tiny, images, targets)


def close(value, expected, atol):
    torch.testing.assert_close(value, expected, rtol=0, atol=atol)


def boxes():
    return [torch.tensor([[60.0, 60.0, 160.0, 160.0]])] * 2


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


@pytest.mark.parametrize("kind", [Insertion, Deletion])
def test_insertion_and_deletion_plot_their_mean_curve(kind, tiny, images, targets, maps):
    metric = kind(steps=4)
    metric.update(tiny, images, maps, targets)
    figure, axes = metric.plot()
    assert figure is not None
    close(torch.tensor(axes.lines[0].get_ydata()), metric.curves.mean(0), 1e-6)
    assert f"{metric.compute():.3f}" in " ".join(labels(axes))
    values = [metric.compute(), metric.compute()]
    _, over_time = metric.plot(values)
    close(torch.tensor(over_time.lines[0].get_ydata()), torch.stack(values), 1e-6)


def test_both_curves_at_once_are_those_of_either_metric(tiny, images, targets, maps):
    both, insertion, deletion = InsertionDeletion(steps=4), Insertion(steps=4), Deletion(steps=4)
    for metric in (both, insertion, deletion):
        metric.update(tiny, images, maps, targets)
    values = both.compute()
    close(values["insertion"], insertion.compute(), 1e-6)
    close(values["deletion"], deletion.compute(), 1e-6)
    close(values["overall"], insertion.compute() - deletion.compute(), 1e-6)
    _, axes = both.plot()
    assert [line.get_ydata()[-1] for line in axes.lines[:2]] == pytest.approx(
        [insertion.curves.mean(0)[-1].item(), deletion.curves.mean(0)[-1].item()], abs=1e-6
    )
    areas = {name: f"{values[name]:.3f}" for name in ("insertion", "deletion")}
    assert labels(axes) == [f"Insertion, area {areas['insertion']}", f"Deletion, area {areas['deletion']}"]


def test_the_pointing_game_of_each_class_has_the_classes_names():
    game = ClasswiseWrapper(PointingGame(3, tolerance=2.0, average="none"), labels=["cat", "dog", "owl"])
    maps = torch.zeros(2, 32, 32)
    maps[:, 16, 16] = 1
    game.update(
        maps, [torch.tensor([[8.0, 8, 24, 24]]), torch.tensor([[0.0, 0, 4, 4]])], torch.tensor([0, 1])
    )
    values = game.compute()
    assert values["pointinggame_cat"] == 1
    assert values["pointinggame_dog"] == 0
    assert values["pointinggame_owl"].isnan()
    _, axes = game.metric.plot()
    assert labels(axes)[:2] == ["Class 0", "Class 1"]


def test_unseen_classes_count_as_0_also_one_by_one():
    game = PointingGame(2, unseen_as_zero=True, average="none")
    maps = torch.zeros(1, 32, 32)
    maps[:, 16, 16] = 1
    game.update(maps, [torch.tensor([[8.0, 8.0, 24.0, 24.0]])], torch.tensor([1]))
    assert game.compute().tolist() == [0, 1]


@pytest.mark.usefixtures("unchecked")
def test_another_average_is_refused():
    with pytest.raises(ValueError, match=r'average must be "macro" or "none", got \'micro\''):
        PointingGame(2, average="micro")


def test_sess_metric_plots_chosen_figures(tiny, images, targets):
    metric = SESSMetric(SESS(GradCAM(), num_scales=1), steps=4)
    first = metric(tiny, images, targets)
    _, axes = metric.plot()
    assert labels(axes) == ["insertion", "deletion", "overall"]
    _, axes = metric.plot(keys=["overall", "base/overall", "pointing_game"])
    assert labels(axes) == ["overall", "base/overall"]
    _, axes = metric.plot([first, metric.compute()], keys=["overall"])
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(
        [first["overall"], metric.compute()["overall"]]
    )


def test_a_tracker_finds_the_best_epoch_by_one_score(tiny, images, targets):
    tracker = MetricTracker(SingleScore(SESSMetric(GradCAM(), steps=4), "deletion"))
    assert not tracker.maximize
    expected = []
    for chosen in (targets, targets.flip(0)):
        tracker.increment()
        tracker.update(tiny, images, chosen)
        expected.append(tracker.compute().item())
    best, step = tracker.best_metric(return_step=True)
    assert (best, step) == (pytest.approx(min(expected)), expected.index(min(expected)))


def test_min_and_max_of_one_score(tiny, images, targets):
    metric = MinMaxMetric(SingleScore(SESSMetric(GradCAM(), steps=4), "overall"))
    metric.update(tiny, images, targets)
    values = metric.compute()
    assert values["raw"] == values["min"] == values["max"]
    expected = SESSMetric(GradCAM(), steps=4)
    expected.update(tiny, images, targets)
    assert values["raw"].item() == pytest.approx(expected.compute()["overall"])


def test_a_single_score_is_that_of_a_batch_and_of_all(tiny, images, targets):
    score, whole = SingleScore(SESSMetric(GradCAM(), steps=4)), SESSMetric(GradCAM(), steps=4)
    for chosen in (targets, targets.flip(0)):
        assert score(tiny, images, chosen).item() == pytest.approx(whole(tiny, images, chosen)["overall"])
    assert score.compute().item() == pytest.approx(whole.compute()["overall"])
    score.reset()
    assert score.compute().isnan()
    with pytest.raises(ValueError, match=r"key must name a score.* got 'accuracy'"):
        SingleScore(SESSMetric(GradCAM()), "accuracy")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_states_take_another_type_and_counts_stay_whole(dtype, tiny, images, targets, maps):
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    plain, typed = (
        MetricCollection([Insertion(steps=4), Deletion(steps=4), InsertionDeletion(steps=4)])
        for _ in range(2)
    )
    typed.set_dtype(dtype)
    for metric in (plain, typed):
        metric.update(tiny, images, maps, targets)
    for name, value in plain.compute().items():
        close(typed.compute()[name].float(), value, tolerance)
    assert typed["Insertion"].curves.dtype == dtype
    game = PointingGame(5)
    game.set_dtype(dtype)
    game.update(maps, boxes(), targets)
    assert game.hits.dtype == torch.int64
    whole = [SESSMetric(GradCAM(), steps=4) for _ in range(2)]
    whole[1].set_dtype(dtype)
    for metric in whole:
        metric.update(tiny, images, targets, boxes())
    values = whole[0].compute()
    assert whole[1].compute().keys() == values.keys()
    for name, value in whole[1].compute().items():
        assert value == pytest.approx(values[name], abs=5 * tolerance, nan_ok=True), name
    assert whole[1].ends[0].dtype == dtype
    assert whole[1].targets[0].dtype == torch.int64
