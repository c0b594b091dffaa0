import colorsys

import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

import numpy as np
import torch
from sklearn.datasets import load_digits

from digits import (
    COOL,
    DIGIT_SIZES,
    PHOTOGRAPHS,
    SIZE,
    WARM,
    Digits,
    DigitsDataModule,
    SmallCNN,
    collate,
    make_scene,
    render,
    scans,
)

SPLITS = ("train", "val")


def scenes(split, count=60):
    return [make_scene(split, index) for index in range(count)]


def hue(digit):
    return colorsys.rgb_to_hsv(*digit.colour.tolist())[0]


def make_data(split="val", length=6):
    return Digits(split, length, DigitsDataModule.mean, DigitsDataModule.std)


@pytest.mark.parametrize("split", SPLITS)
def test_each_box_is_exactly_the_pixels_which_its_digit_changes(split):
    for scene in scenes(split, 30):
        black = scene._replace(photograph=torch.zeros(3, SIZE, SIZE))
        for digit in scene.targets:
            without = black._replace(targets=[other for other in scene.targets if other is not digit])
            rows, columns = (render(black) != render(without)).any(0).nonzero().T
            ink = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
            assert digit.box == ink


def test_the_item_lists_the_boxes_of_every_target_and_of_nothing_else():
    data = make_data(length=20)
    for index, scene in enumerate(scenes("val", 20)):
        assert data[index][1]["boxes"].tolist() == [list(digit.box) for digit in scene.targets]


def test_no_two_digits_touch_and_all_lie_inside_the_picture():
    for scene in scenes("train"):
        claimed = torch.zeros(SIZE, SIZE, dtype=torch.int)
        for digit in scene.targets + scene.distractors:
            x0, y0, x1, y1 = digit.box
            assert claimed[y0:y1, x0:x1].shape == digit.opacity.shape
            claimed[y0:y1, x0:x1] += 1
        assert claimed.max() == 1


@pytest.mark.parametrize("split", SPLITS)
def test_warm_ink_determines_the_label_and_no_distractor_shares_it(split):
    for stated, scene in zip(make_data(split, 60).labels.tolist(), scenes(split), strict=True):
        (label,) = {digit.label for digit in scene.targets}
        assert stated == label
        assert label not in {digit.label for digit in scene.distractors}
        assert 1 <= len(scene.targets) <= 3
        assert 2 <= len(scene.distractors) <= 5
        assert all(WARM[0] <= hue(digit) <= WARM[1] for digit in scene.targets)
        assert all(COOL[0] <= hue(digit) <= COOL[1] for digit in scene.distractors)


def test_train_and_validation_share_no_scan_and_no_photograph():
    order = np.random.default_rng(0).permutation(1797)
    images = torch.from_numpy(load_digits().images[order] / 16).float()
    assert torch.equal(torch.cat([scans(split)[0] for split in SPLITS]), images)
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])


def test_the_same_index_is_the_same_picture_whatever_the_global_seed():
    torch.manual_seed(1)
    first = render(make_scene("train", 7))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(first, render(make_scene("train", 7)))
    assert not torch.equal(first, render(make_scene("train", 8)))
    assert not torch.equal(first, render(make_scene("val", 7)))


def test_rendering_leaves_the_global_random_states_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    make_data(length=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_digits_come_in_sizes_a_factor_of_two_apart_and_more():
    heights = [digit.opacity.shape[0] for scene in scenes("val") for digit in scene.targets]
    assert min(heights) < DIGIT_SIZES[1] / 2 < max(heights) <= DIGIT_SIZES[1]


def test_collate_stacks_images_and_labels_and_lists_boxes():
    data = make_data(length=4)
    images, targets = collate([data[index] for index in range(4)])
    assert images.shape == (4, 3, SIZE, SIZE)
    assert targets["labels"].tolist() == data.labels.tolist()
    assert [boxes.shape[1] for boxes in targets["boxes"]] == [4, 4, 4, 4]


def test_small_cnn_ends_on_a_grid_as_coarse_as_a_resnets():
    model, images = SmallCNN(), torch.zeros(2, 3, SIZE, SIZE)
    assert model.features(images).shape[2:] == (4, 4)
    assert model(images).shape == (2, 10)


def test_the_data_module_shuffles_the_same_way_whatever_the_global_seed():
    first, second = (next(iter(make_module().train_dataloader()))[1]["labels"] for _ in range(2))
    assert torch.equal(first, second)


def make_module():
    module = DigitsDataModule(train_size=8, val_size=2, batch_size=8)
    module.setup()
    return module
