"""How many forward passes an update costs."""

from dataclasses import replace

import pytest
import torch

from lightning_models import Counter
from scored import TARGETS, TWO_SCALES, Channel, run
from sess_lightning import SESSMetric
from sess_lightning.methods import RISE, GradCAM, IntegratedGradients, RandomMap, SmoothGrad


def test_an_image_costs_56_forwards_a_further_map_54_and_zeros_one_per_run(model, images):
    counter, metric = Counter(model), SESSMetric(Channel(0))
    run(metric, model, images, parts=(slice(0, 2), slice(2, 6)))
    assert counter.images == 1 + 6 * 56
    counter.images = 0
    metric.reset()
    run(metric, model, images, parts=(slice(0, 2),))
    assert counter.images == 1 + 2 * 56
    counter.images = 0
    run(SESSMetric(Channel(0), compare={"green": Channel(1)}), model, images)
    assert counter.images == 1 + 6 * (56 + 54)


def test_methods_add_their_own_forwards_and_nothing_else(model, images):
    GradCAM()(model, images[:1], TARGETS[:1])  # Finding the layer is paid once.
    counter = Counter(model)
    run(SESSMetric(TWO_SCALES), model, images)
    windows = TWO_SCALES.count_forwards(model, (32, 32))
    assert windows == 5
    assert counter.images == 1 + 6 * (56 + windows + 54)  # The base's map comes with the first window.


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
@pytest.mark.parametrize("clock", [None, lambda _: 0.0], ids=["untimed", "timed"])
def test_no_score_is_computed_that_only_a_method_would_read(model, images, clock, several):
    noisy = SmoothGrad(IntegratedGradients(2), 3)
    methods = {"": IntegratedGradients(3), "rise": RISE(4), "noisy": noisy, "random": RandomMap()}
    metric = SESSMetric(methods[""], compare={name: methods[name] for name in list(methods)[1:]}, clock=clock)
    told = [method.count_forwards(model, (32, 32)) for method in methods.values()]
    assert told == [3, 4, 6, 0]
    counter = Counter(model)
    metric.update(model, images[:1] if several else images[:3], TARGETS[:3])
    assert counter.images == 1 + 3 * (56 + 3 * 54 + sum(told))


BESIDE = {"base": GradCAM(), "red": Channel(0)}


@pytest.mark.parametrize("several", [False, True], ids=["one class", "several classes"])
@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({}, False),
        ({"prefilter_ratio": 0.7}, False),
        ({"coarse_to_fine": 0.8}, False),
        ({"smoothing": True, "channel_weights": False}, False),
        ({"scales": (48, 32)}, True),
        ({"window": 24}, True),
        ({"base": GradCAM(activation="sigmoid")}, True),
    ],
    ids=str,
)
def test_the_base_is_read_off_the_first_window_where_that_is_the_image(
    model, images, settings, alone, several
):
    method = replace(TWO_SCALES, **settings)
    given, targets = (images[:1], TARGETS[1:4]) if several else (images, TARGETS)
    counter = Counter(model)
    shared, apart = (SESSMetric(method, compare=BESIDE, clock=clock) for clock in (None, lambda _: 0.0))
    forwards = []
    for metric in (apart, apart, shared):  # Twice: finding layers is paid once.
        metric.reset()
        counter.images = 0
        metric.update(model, given, targets)
        forwards.append(counter.images)
    assert forwards[1] - forwards[2] == len(targets) * (not alone)
    assert list(shared.latest) == ["", "base", "red"]
    for name, found in shared.latest.items():
        torch.testing.assert_close(found.maps, apart.latest[name].maps, atol=1e-6, rtol=0)
        # Where rounding swaps two pixels over the end of a step, that one point of the curve moves.
        assert (found.insertion - apart.latest[name].insertion).abs().mean(1).max() < 1e-3
