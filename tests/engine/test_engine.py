import gc
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from formula import equation_2, picture
from sess_lightning.engine.fusion import (
    canvas_strips,
    channel_weights,
    crop,
    crop_strips,
    fuse,
    smooth,
    window_means,
)
from sess_lightning.engine.windows import (
    WindowStream,
    chunked,
    descent,
    kept_count,
    least_side,
    plan_windows,
    prefilter,
    ranked,
    scale_sides,
    scaled_size,
    sides_of,
    window_boxes,
    windows,
)
from sess_lightning.ops import resize

TILES = json.loads((Path(__file__).parents[1] / "golden" / "tiles.json").read_text())
CPU = torch.device("cpu")


def test_scales_are_64_px_apart_for_a_window_of_224_and_in_proportion_for_others():
    assert scale_sides(224, 12) == [224, 288, 352, 416, 480, 544, 608, 672, 736, 800, 864, 928]
    assert scale_sides(32, 4) == [32, 41, 50, 59]


def test_sides_are_those_given_else_the_papers():
    assert sides_of([224, 320], 224, 6) == (224, 320)
    assert sides_of(None, 224, 2) == (224, 288)


def test_scaled_size_floors_the_longer_side():
    assert scaled_size(375, 500, 928) == (928, 1237)
    assert scaled_size(500, 375, 224) == (298, 224)
    assert scaled_size(224, 224, 288) == (288, 288)


def test_window_boxes_pulls_the_last_window_inside_the_border():
    assert window_boxes(height=4, width=5, window=4, stride=4).tolist() == [[0, 0, 4, 4], [1, 0, 5, 4]]


def test_window_boxes_go_row_by_row():
    assert window_boxes(height=3, width=3, window=2, stride=2).tolist() == [
        [0, 0, 2, 2], [1, 0, 3, 2], [0, 1, 2, 3], [1, 1, 3, 3],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "stride", "counts"),
    [
        ((224, 224), 224, {1: 1, 6: 31, 10: 81, 12: 122}),
        ((375, 500), 224, {6: 39, 12: 157}),
        ((224, 224), 112, {12: 303}),
    ],
)
def test_plans_hold_as_many_windows_as_the_authors_code_makes(size, stride, counts):
    got = {n: len(plan_windows(size, 224, stride, tuple(scale_sides(224, n)))) for n in counts}
    assert got == counts


@pytest.mark.parametrize("case", TILES, ids=lambda c: f"{c['h']}x{c['w']}-n{c['n']}-step{c['step']}")
def test_windows_lie_where_the_authors_code_lays_them(case):
    plan = plan_windows((case["h"], case["w"]), 224, case["step"], tuple(scale_sides(224, case["n"])))
    tiles = [
        [min(scale), *scale, box[1], box[0]]
        for scale, boxes in zip(plan.scales, plan.boxes, strict=True)
        for box in boxes
    ]
    assert len(plan) == len(tiles) == case["count"]
    assert (tiles[0], tiles[-1]) == (case["first"], case["last"])
    assert np.sum(tiles, axis=0).tolist() == case["sum"]
    assert case["tiles"] in (None, tiles)


@pytest.mark.parametrize("length", [4, 5, 7, 8, 9, 23])
@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 3), (4, 1), (1, 1)])
def test_windows_cover_every_pixel_and_count_by_the_formula(length, window, stride):
    boxes = window_boxes(length, 4, window, stride)
    rows = sorted({box[1] for box in boxes.tolist()})
    assert len(rows) == 1 + max(0, math.ceil((length - window) / stride))
    assert {y for top in rows for y in range(top, top + window)} == set(range(length))


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (6, 6, "window 6 exceeds the 5x9 scaled image; use scales >= window"),
        (4, 5, "stride 5 with window 4; use a window >= 1 and 1 <= stride <= window"),
        (4, 0, "stride 0 with window 4"),
        (0, 0, "stride 0 with window 0"),
    ],
)
def test_windows_that_do_not_fit_or_leave_gaps_are_refused_by_name(window, stride, message):
    with pytest.raises(ValueError, match=message):
        window_boxes(5, 9, window, stride)


def test_no_scale_is_refused():
    with pytest.raises(ValueError, match="num_scales must be at least 1, got 0"):
        scale_sides(224, 0)
    with pytest.raises(ValueError, match=r"scales is empty; give at least one"):
        sides_of((), 4, 1)


def test_windows_of_the_image_itself_are_the_image_untouched():
    image = picture(96, 128, 4)[None]
    plan = plan_windows((96, 128), 96, 96, (96,))
    left, right = windows(image, plan)
    assert torch.equal(left, image[0, :, :, :96])
    assert torch.equal(right, image[0, :, :, 32:])


@pytest.mark.parametrize(
    ("size", "window", "side"),
    [
        ((96, 128), (96, 128), 96), ((128, 96), (128, 96), 96), ((96, 128), (64, 64), 64),
        ((96, 128), (48, 64), 48), ((96, 128), (90, 300), 225), ((100, 100), (30, 90), 90),
        ((97, 131), (97, 131), 97), ((10, 17), (3, 6), 4),
    ],
)  # fmt: skip
def test_the_smallest_scale_just_holds_a_window(size, window, side):
    assert least_side(size, window) == side
    height, width = scaled_size(*size, side)
    assert height >= window[0]
    assert width >= window[1]
    smaller = scaled_size(*size, side - 1)
    assert smaller[0] < window[0] or smaller[1] < window[1]


def test_rectangular_windows_cover_every_scale_row_by_row():
    plan = plan_windows((20, 40), (20, 40), (20, 40), (20, 26))
    assert plan.scales == ((20, 40), (26, 52))
    assert plan.boxes == (
        ((0, 0, 40, 20),), ((0, 0, 40, 20), (12, 0, 52, 20), (0, 6, 40, 26), (12, 6, 52, 26)),
    )  # fmt: skip
    assert plan.begins_whole
    assert plan.window == 20


def test_windows_come_image_by_image_scale_by_scale():
    images = torch.stack([picture(20, 24, 1), picture(20, 24, 2)])
    plan = plan_windows((20, 24), 16, 8, (16, 20))
    expected = [
        resize(image[None], size)[0, :, y0:y1, x0:x1]
        for image in images
        for size, boxes in zip(plan.scales, plan.boxes, strict=True)
        for x0, y0, x1, y1 in boxes
    ]
    got = list(windows(images, plan))
    assert len(got) == 2 * len(plan) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("limit", [1, 7, 1000])
@pytest.mark.parametrize("together", [False, True], ids=["as on a CPU", "as on an accelerator"])
def test_a_window_stream_has_all_windows_in_batches_of_any_size(together, limit):
    images = torch.stack([picture(20, 24, seed) for seed in range(3)])
    plan = plan_windows((20, 24), 16, 8, (16, 20, 30))
    stream = WindowStream(images, plan, limit=limit, together=together)
    batches = [stream.take(slice(begin, begin + 5)) for begin in range(0, len(stream), 5)]
    assert [len(batch) for batch in batches] == [5] * (len(stream) // 5) + [len(stream) % 5]
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert torch.equal(
        stream.gathered(torch.cat(batches)).flatten(0, 1), torch.stack([*windows(images, plan)])
    )
    owners = stream.gathered(stream.spread(torch.arange(3)))
    assert torch.equal(owners, torch.arange(3)[:, None].expand(3, len(plan)))


@pytest.mark.parametrize("together", [False, True])
def test_windows_taken_again_after_a_batch_that_failed_are_untouched(together):
    images, plan = picture(20, 24, 1)[None], plan_windows((20, 24), 16, 8, (16, 20))
    stream = WindowStream(images, plan, limit=4, together=together)
    stream.take(slice(0, 4)).zero_()
    assert torch.equal(stream.take(slice(0, 2)), torch.stack([*windows(images, plan)])[:2])
    stream.take(slice(2, 4))
    assert torch.equal(stream.take(slice(4, 6)), torch.stack([*windows(images, plan)])[4:6])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("window", [32, (40, 28), (30, 32)])
def test_crop_cuts_the_same_windows_straight_out_of_the_image(window, antialias):
    image = picture(60, 45, 5)
    plan = plan_windows((60, 45), window, (16, 12), (32, 45, 60))
    which = torch.arange(len(plan)).flip(0)
    got = crop(image, *crop_strips(plan, antialias, CPU), which)
    expected = torch.stack(list(windows(image[None], plan, antialias))).flip(0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_chunked_gives_full_batches_and_a_rest():
    assert [part.tolist() for part in chunked(torch.arange(5), 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("count", "ratio", "kept"),
    [(303, 0.99, 4), (31, 0.5, 16), (12, 0.9, 2), (39, 0.99, 1), (10, 0.0, 10), (1, 0.9, 1)],
)
def test_the_pre_filter_keeps_what_the_authors_arithmetic_keeps(count, ratio, kept):
    assert kept_count(count, ratio) == kept
    assert prefilter(torch.arange(float(count)), ratio).tolist() == list(
        range(count - 1, count - kept - 1, -1)
    )


def test_the_pre_filter_keeps_the_earlier_window_of_a_tie_and_ranks_nan_last():
    scores = torch.tensor([torch.nan, 0.2, 0.5, 0.5, 0.2, 0.5])
    assert prefilter(scores, 0.0).tolist() == [2, 3, 5, 1, 4, 0]
    assert prefilter(scores, 0.7).tolist() == [2, 3]


def test_windows_whose_scores_differ_by_rounding_keep_their_order():
    scores = torch.tensor([[0.2, 0.5, 0.5 + 1e-6, 0.5 - 1e-6, 0.9, torch.nan, torch.nan]])
    assert ranked(scores, 1e-4).tolist() == [[4, 1, 2, 3, 0, 5, 6]]
    assert ranked(scores).tolist() == [[4, 2, 1, 3, 0, 5, 6]]
    assert ranked(scores[:, :1], 1e-4).tolist() == [[0]]


def test_the_pre_filter_ranks_each_image_on_its_own():
    assert prefilter(torch.tensor([[0.1, 0.9], [0.9, 0.1]]), 0.5).tolist() == [[1], [0]]


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, math.nan])
def test_a_pre_filter_that_keeps_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match=r"prefilter_ratio must be in \[0, 1\), got"):
        kept_count(10, ratio)


def test_channel_weights_are_shares_of_the_best_score():
    weights = channel_weights(torch.tensor([[0.5, 0.25, 0.125]]).log())
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5, 0.25]]))


def test_channel_weights_survive_scores_far_below_the_range_of_float32():
    assert torch.tensor(-1000.0).exp() == 0
    weights = channel_weights(torch.tensor([-1000.0, -1001.0, -3000.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-1), 0.0]))


def test_a_window_without_a_score_weighs_nothing():
    assert channel_weights(torch.tensor([0.0, torch.nan, -torch.inf])).tolist() == [1.0, 0.0, 0.0]
    assert channel_weights(torch.tensor([torch.nan, -torch.inf])).tolist() == [0.0, 0.0]


@pytest.fixture(params=[16, (12, 19)], ids=["squares", "rectangles"])
def case(request):
    plan = plan_windows((20, 27), request.param, 9, (16, 20, 33))
    generator = torch.Generator().manual_seed(0)
    which = torch.randperm(len(plan), generator=generator)[: len(plan) // 2]
    # Off zero, so that no pixel sits on the threshold where the last digit decides.
    maps = torch.rand(len(which), 4, 4, generator=generator) + 0.01
    return plan, which, maps, torch.rand(len(which), generator=generator)


def fuse_one(maps, weights, strips, which, **options):
    """Fuse the maps of a single image, all at once."""
    (fused,) = fuse([maps[None]], weights[None], strips, which[None], **options)
    return fused


@pytest.mark.parametrize("theta", [0.0, 0.3])
@pytest.mark.parametrize("fusion", ["mean", "max", "average"])
def test_fuse_is_equation_2(case, theta, fusion):
    plan, which, maps, weights = case
    strips = canvas_strips(plan, (4, 4), CPU)
    got = fuse_one(maps, weights, strips, which, theta=theta, fusion=fusion)
    expected = equation_2(maps, weights, plan, which, theta, fusion)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


def test_rounding_does_not_decide_which_windows_count(case):
    plan, which, maps, weights = case
    strips = canvas_strips(plan, (4, 4), CPU)
    rectified = (maps - 0.5).relu() * 2
    noise = (torch.rand(maps.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 4e-7
    got = fuse_one(rectified + noise, weights, strips, which)
    torch.testing.assert_close(got, fuse_one(rectified, weights, strips, which), atol=1e-6, rtol=0)


def test_a_window_that_weighs_little_counts_as_much_as_any_other():
    plan, one = plan_windows((8, 8), 8, 8, (8,)), torch.rand(1, 8, 8) + 0.1
    weights, same = torch.tensor([1.0, 1e-9]), torch.zeros(2).long()
    fused = fuse_one(one.expand(2, 8, 8), weights, canvas_strips(plan, (8, 8), CPU), same)
    torch.testing.assert_close(fused, one[0] / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fusion", ["mean", "max", "average"])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_images_fuse_together_as_they_do_alone_whatever_the_chunk(case, chunk, fusion):
    plan, which, maps, weights = case
    strips = canvas_strips(plan, (4, 4), CPU)
    alone = [
        fuse_one(maps, weights, strips, which, fusion=fusion),
        fuse_one(maps.flip(0), weights**2, strips, which.flip(0), fusion=fusion),
    ]
    together = fuse(
        torch.stack([maps, maps.flip(0)]).split(chunk, 1), torch.stack([weights, weights**2]), strips,
        torch.stack([which, which.flip(0)]), fusion=fusion,
    )  # fmt: skip
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-6, rtol=0)


def test_fuse_holds_no_more_maps_than_a_chunk_at_a_time():
    plan = plan_windows((8, 8), 4, 1, (8,))
    alive, most = weakref.WeakSet(), 0

    def stream():
        nonlocal most
        for _ in range(len(plan)):
            one = torch.rand(4, 4)
            alive.add(one)
            most = max(most, len(alive))
            yield one

    gc.collect()
    parts = (part[None] for part in chunked(stream(), 3))
    fuse(parts, torch.ones(1, 25), canvas_strips(plan, (4, 4), CPU), torch.arange(25)[None])
    assert len(plan) == 25
    assert most <= 4  # A chunk, and the map that is just being made.


def test_a_flat_map_neither_adds_nor_counts(case):
    plan, which, maps, weights = case
    strips = canvas_strips(plan, (4, 4), CPU)
    maps = maps.clone()
    maps[2] = 0
    without = [i for i in range(len(which)) if i != 2]
    got = fuse_one(maps, weights, strips, which)
    expected = fuse_one(maps[without], weights[without], strips, which[without])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    weightless = weights.clone()
    weightless[2] = 0
    torch.testing.assert_close(fuse_one(maps, weightless, strips, which), expected, atol=1e-6, rtol=0)


def test_equal_windows_fuse_to_one_of_them():
    plan = plan_windows((8, 8), 8, 8, (8,))
    one = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    fused = fuse_one(
        one.expand(5, 8, 8), torch.ones(5), canvas_strips(plan, (8, 8), CPU), torch.zeros(5).long()
    )
    torch.testing.assert_close(fused, one, atol=1e-6, rtol=0)


def test_smooth_is_an_11_px_gaussian_of_sigma_5():
    spike = torch.zeros(1, 31, 31)
    spike[0, 15, 15] = 1
    weights = torch.exp(-(torch.arange(-5.0, 6.0) ** 2) / 50)
    expected = torch.outer(weights, weights) / weights.sum() ** 2
    smoothed = smooth(spike)[0]
    torch.testing.assert_close(smoothed[10:21, 10:21], expected)
    assert smoothed[:10].sum() == smoothed[:, 21:].sum() == 0


@pytest.mark.parametrize(
    ("scales", "share", "expected"),
    [(10, 0.3, (4, 11)), (10, 0.2, (3, 7)), (6, 0.5, (3, 7)), (1, 0.1, (1, 0)), (6, 0.01, (1, 0)),
     (6, 1.0, (6, 0))],
)  # fmt: skip
def test_a_descent_takes_three_fifths_of_its_windows_from_the_coarser_scales(scales, share, expected):
    plan = plan_windows((224, 224), 224, 224, tuple(scale_sides(224, scales)))  # 1, 4, 4, 4, 9, 9, 9, ...
    assert descent(plan, share) == expected


def test_window_means_are_those_of_the_crops():
    plan = plan_windows((60, 80), 40, 40, (60, 70))
    maps, strips = torch.rand(2, 60, 80), crop_strips(plan, True, torch.device("cpu"))
    cut = torch.stack([crop(each[None], *strips, torch.arange(len(plan))) for each in maps])
    torch.testing.assert_close(window_means(maps, *strips), cut.mean((2, 3, 4)))
