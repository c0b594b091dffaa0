import sys

import numpy as np
import pytest
import torch
from torch import nn

from formula import Tiny, fill, uniform
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import XRAI
from sess_lightning.methods.regions import grow

pytest.importorskip("skimage")
FAST = XRAI(steps=2, scales=(250.0, 500.0))


def grow_by_hand(attribution, segments, min_gain):
    """The paper's algorithm 1 as its authors run it: everything anew at each step."""
    grown = np.full(attribution.shape, -np.inf)
    covered = np.zeros(attribution.shape, dtype=bool)
    remaining = list(segments)
    while True:
        remaining = [mask for mask in remaining if (mask & ~covered).sum() >= min_gain]
        if not remaining:
            break
        gains = [attribution[mask & ~covered].mean() for mask in remaining]
        best = remaining.pop(int(np.argmax(gains)))
        grown[best & ~covered] = max(gains)
        covered |= best
    left = np.isneginf(grown)
    if left.any():
        grown[left] = attribution[left].mean()
    return grown


@pytest.mark.parametrize("min_gain", [1, 20])
def test_growth_is_the_authors_loop(min_gain):
    attribution = uniform(40 * 50, 1).reshape(40, 50).astype(np.float64)
    corners = (uniform(4 * 30, 2).reshape(30, 4) + 1) / 2
    y, x = np.mgrid[:40, :50]
    segments = np.stack(
        [
            (y >= 40 * a) & (y < 40 * a + 20 * c) & (x >= 50 * b) & (x < 50 * b + 25 * d)
            for a, b, c, d in corners
        ]
    )
    expected = grow_by_hand(attribution, segments, min_gain)
    assert len(np.unique(expected)) > 10
    np.testing.assert_allclose(grow(attribution, segments, min_gain), expected, atol=1e-12)


def test_the_densest_segment_comes_first_and_keeps_what_it_shares():
    attribution = np.array([[4.0, 2.0, 0.0, 1.0]])
    segments = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 0]]], dtype=bool)
    assert grow(attribution, segments).tolist() == [[3.0, 3.0, 0.0, 1.0]]


def test_what_no_segment_covers_shares_its_mean():
    segments = np.array([[[1, 0, 0, 0]]], dtype=bool)
    assert grow(np.array([[5.0, 1.0, 2.0, 3.0]]), segments).tolist() == [[5.0, 2.0, 2.0, 2.0]]


def test_attributions_are_captums_from_black_and_white(tiny, images, targets):
    captum = pytest.importorskip("captum.attr")
    integral = captum.IntegratedGradients(tiny)
    both = []
    for image, target in zip(images, targets, strict=True):
        ends = [torch.full_like(image, end.item())[None] for end in (image.min(), image.max())]
        both.append(sum(integral.attribute(image[None], end, target.item(), n_steps=6) for end in ends) / 2)
    expected = torch.cat(both).amax(1).float()
    got = XRAI(steps=6).attributions(tiny, images, targets)
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_segments_are_felzenszwalbs_dilated_by_a_disc():
    from skimage.morphology import dilation, disk
    from skimage.segmentation import felzenszwalb

    image = cats()[0]
    pixels = image.permute(1, 2, 0).double().numpy()
    pixels = 2 * (pixels - pixels.min()) / (pixels.max() - pixels.min()) - 1
    labels = felzenszwalb(pixels, scale=500.0, sigma=0.8, min_size=150)
    expected = [dilation(labels == label, disk(5)) for label in range(labels.max() + 1)]
    got = XRAI(scales=(500.0,)).segments(image)
    assert len(got) == len(expected) > 10
    # The picture was stretched in float32: a pixel at the edge of two segments may go to either.
    assert (got != np.stack(expected)).mean() < 1e-4


def test_segments_of_any_size_cover_the_picture():
    assert XRAI(scales=(250.0,)).segments(cats(90)[0, :, :70]).any(0).all()


@pytest.mark.parametrize("real", [False, True], ids=["tiny", "mobilenet"])
def test_xrai_is_the_formula(real, tiny, images, targets):
    targets = torch.tensor([EGYPTIAN_CAT, TABBY]) if real else targets
    model, images = (mobilenet(), cats(96)) if real else (tiny, images)
    got = FAST.explain(model, images, targets)
    attributions = FAST.attributions(model, images, targets).double().numpy()
    for map_, attribution, image in zip(got.maps, attributions, images, strict=True):
        expected = grow_by_hand(attribution, FAST.segments(image), 50)
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        np.testing.assert_allclose(map_, expected, atol=1e-5)
    scores = model(images).softmax(1)[[0, 1], targets].detach()
    torch.testing.assert_close(got.scores, scores, atol=1e-6, rtol=0)


def test_forwards_are_as_many_as_told(images, targets):
    class Counting(Tiny):
        seen = 0

        def forward(self, images):
            Counting.seen += len(images)
            return super().forward(images)

    FAST(fill(Counting()), images, targets)
    assert Counting.seen == 2 * FAST.count_forwards(Counting(), (224, 224)) == 2 * 4


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_model_that_says_nothing_gets_zeros(value, tiny, images, targets):
    nn.init.constant_(tiny.fc.weight, value)
    assert not FAST(tiny, images, targets).any()


def test_a_flat_image_gets_zeros(tiny, targets):
    assert not FAST(tiny, torch.ones(2, 3, 64, 64), targets).any()


def test_without_scikit_image_the_extra_is_named(tiny, images, targets, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ImportError, match=r"XRAI .* pip install sess-lightning\[regions\]"):
        XRAI()(tiny, images, targets)


def test_wrong_hyper_parameters_are_refused():
    with pytest.raises(ValueError, match="XRAI: give at least one scale"):
        XRAI(scales=())
    with pytest.raises(ValueError, match="IntegratedGradients: steps must be at least 1, got 0"):
        XRAI(steps=0)
