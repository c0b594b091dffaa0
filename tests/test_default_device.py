"""Tensors lie where their images do, or on the host, whatever torch.set_default_device says."""

import pytest
import torch

from every_method import ON_DEVICE, made
from sess_lightning import SESS, GradCAM, Insertion, PointingGame, SESSMetric
from sess_lightning.metrics.functional import deletion_curve, insertion_curve, pointing_hits, relevance_mass
from sess_lightning.regions import read_regions


@pytest.mark.parametrize("name", ON_DEVICE)
def test_methods_follow_their_images(name, tiny, images, targets):
    expected = made(name)(tiny, images, targets)
    with torch.device("meta"):
        assert torch.equal(made(name)(tiny, images, targets), expected)


def test_metrics_follow_their_images_and_compute_on_the_host(tiny, images, targets):
    metric, insertion, game = SESSMetric(SESS(GradCAM(), num_scales=2)), Insertion(steps=3), PointingGame(5)
    boxes = [torch.tensor([[4.0, 4.0, 90.0, 90.0]] * count) for count in (1, 2)]
    maps = GradCAM()(tiny, images, targets)
    masks = torch.zeros(maps.shape, dtype=torch.bool)
    masks[:, 40:100, 40:100] = True

    def figures():
        curves = [draw(tiny, images, maps, targets, steps=3) for draw in (insertion_curve, deletion_curve)]
        inside = [
            score(maps, regions) for score in (pointing_hits, relevance_mass) for regions in (boxes, masks)
        ]
        metric.reset(), insertion.reset(), game.reset()
        metric.update(tiny, images, targets, boxes)
        insertion.update(tiny, images, maps, targets)
        game.update(maps, boxes, targets)
        metric.plot(), insertion.plot()
        digests = metric.samples().digests
        read = read_regions([[[4.0, 4.0, 9.0, 9.0]], None], size=(16, 16))
        computed = [metric.compute(), metric.curves(), insertion.compute(), game.compute()]
        return [*curves, *inside, *computed, digests, *read]

    expected = figures()
    with torch.device("meta"):
        torch.testing.assert_close(figures(), expected, rtol=0, atol=0, equal_nan=True)
