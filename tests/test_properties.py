"""Whatever shapes, settings, targets and boxes are given: a good map, or a ValueError that says why not."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from formula import uniform
from lightning_models import filled_net
from sess_lightning import SESS
from sess_lightning.callback.batches import check_boxes, read_batch
from sess_lightning.methods import GradCAM, GuidedBackprop
from sess_lightning.metrics.functional import deletion_curve, insertion_curve, pointing_hits
from sess_lightning.types import Batch

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sides = st.integers(8, 40)
counts = st.integers(1, 3)
MODEL = filled_net()


def pictures(count, height, width, start=1):
    return torch.from_numpy(uniform(count * 3 * height * width, start)).float().reshape(-1, 3, height, width)


def attempt(method, model, images, targets):
    """Return the maps, or None where the setting is refused in the documented way."""
    try:
        return method(model, images, targets)
    except ValueError:
        return None


@few
@given(
    counts, sides, sides,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([GradCAM(), GuidedBackprop()]),
    st.integers(1, 3), st.none() | sides, st.none() | sides,
    st.floats(0, 0.99), st.floats(0, 1), st.sampled_from(["mean", "max"]), st.booleans(),
    st.lists(st.integers(-1, 4), min_size=3, max_size=3),
)  # fmt: skip
def test_maps_are_finite_and_in_range_or_the_setting_is_refused(
    count, height, width, dtype, base, scales, window, stride, ratio, theta, fusion, weighs, targets
):
    method = SESS(
        base, num_scales=scales, window=window, stride=stride, prefilter_ratio=ratio, theta=theta,
        fusion=fusion, channel_weights=weighs,
    )  # fmt: skip
    targets = torch.tensor(targets[:count])
    images = pictures(count, height, width).to(dtype)
    maps = attempt(method, filled_net().to(dtype), images, targets)
    valid = all(0 <= target < 4 for target in targets.tolist())
    if maps is None:
        assert not valid or window is not None or stride is not None
        return
    assert valid
    assert maps.shape == (count, height, width)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert 0 <= maps.min() <= maps.max() <= 1


@few
@given(st.permutations([0, 1, 2, 3]), sides, sides, st.floats(0, 0.9))
def test_the_order_of_a_batch_and_its_company_do_not_matter(order, height, width, ratio):
    method, images, targets = (
        SESS(GradCAM(), num_scales=2, prefilter_ratio=ratio),
        pictures(4, height, width),
        torch.tensor([0, 1, 2, 3]),
    )
    maps = method(MODEL, images, targets)
    torch.testing.assert_close(method(MODEL, images[order], targets[order]), maps[order], atol=1e-4, rtol=0)
    alone = [method(MODEL, images[i : i + 1], targets[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(torch.stack(alone), maps, atol=1e-4, rtol=0)


@few
@given(counts, sides, st.sampled_from([GradCAM("0"), GuidedBackprop()]))
def test_a_flipped_picture_has_a_flipped_map_where_the_model_does_not_mind(count, side, base):
    kernels = pictures(1, 1, 16)[0, :, 0].T.contiguous()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), *head)
    with torch.no_grad():
        model[0].weight.copy_(kernels[:, :, None, None] - 0.5)
        model[0].bias.zero_()
        model[4].weight.copy_(pictures(1, 1, 64)[0, 0, 0].view(4, 16) - 0.5)
    # Up to twice the window, window places are symmetric.
    method, images, targets = SESS(base, num_scales=2), pictures(count, side, side), torch.arange(count)
    flipped = method(model.eval(), images.flip(-1), targets)
    torch.testing.assert_close(flipped.flip(-1), method(model, images, targets), atol=1e-3, rtol=0)


@few
@given(counts, sides, sides, st.integers(1, 40), st.booleans())
def test_curves_are_probabilities(count, height, width, steps, tied):
    images, targets = pictures(count, height, width), torch.arange(count)
    maps = pictures(count, height, width, 7)[:, 0]
    maps = (maps > 0.5).float() if tied else maps
    for curve in (insertion_curve, deletion_curve):
        found = curve(MODEL, images, maps, targets, steps=steps)
        assert found.shape == (count, steps + 1)
        assert found.isfinite().all()
        assert 0 <= found.min() <= found.max() <= 1


corner = st.integers(-5, 45)
boxes = st.lists(st.tuples(corner, corner, corner, corner), max_size=4)


@few
@given(st.lists(boxes, min_size=2, max_size=2), sides, sides, st.floats(0.5, 60))
def test_boxes_are_played_as_their_masks_or_refused(given_boxes, height, width, tolerance):
    each = [torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in given_boxes]
    batch = read_batch(Batch(pictures(2, height, width), torch.tensor([0, 1]), boxes=each))
    try:
        check_boxes(batch)
    except ValueError:
        return
    maps, masks = pictures(2, height, width, 7)[:, 0], torch.zeros(2, height, width, dtype=torch.bool)
    for mask, rows in zip(masks, given_boxes, strict=True):
        for x0, y0, x1, y1 in rows:
            mask[y0 : min(y1, height), x0 : min(x1, width)] = True
    inside = all(x1 <= width and y1 <= height for rows in given_boxes for _, _, x1, y1 in rows)
    found = pointing_hits(maps, each, tolerance)
    if inside:  # A box may stick out by a pixel of rounding; its mask cannot.
        assert torch.equal(found, pointing_hits(maps, masks, tolerance))


@few
@given(st.recursive(
    st.sampled_from([None, 1, "x", torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["image", "label", "boxes", "masks", "id", "x"]), inner, max_size=4
    ),
    max_leaves=6,
))  # fmt: skip
def test_a_batch_of_any_kind_is_read_or_refused(batch):
    try:
        found = read_batch(batch)
    except (TypeError, ValueError):
        return
    assert len(found.labels) == len(found.images)
