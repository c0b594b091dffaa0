"""Masks and boxes as data sets have them give the figures of bool masks, or are refused with what works."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import functional as transforms

from formula import picture
from lightning_models import filled_net
from sess_lightning import PointingGame, SESSMetric
from sess_lightning.methods import CentreGaussian
from sess_lightning.metrics.functional import pointing_hits, relevance_mass

LABELS = torch.tensor([3, 1])
INSIDE = torch.zeros(2, 32, 32, dtype=torch.bool)
INSIDE[0, 4:20, 8:28] = INSIDE[1, 20:31, 2:14] = True
BOXES = torch.tensor([[8.0, 4, 28, 20], [2, 20, 14, 31]])


@pytest.fixture(scope="module")
def model():
    return filled_net()


def figures(model, regions, labels=LABELS):
    """What a run says of regions: no curves, they do not depend on them."""
    images = torch.stack([picture(32, 32, 1), picture(32, 32, 2)])
    metric = SESSMetric(CentreGaussian(), compare={}, limits={"": 0}, tolerance=3.0)
    metric.update(model, images, labels, regions)
    values = metric.compute()
    return {name: values.get(name) for name in ("pointing_game", "relevance_mass", "region_share")}


@pytest.fixture(scope="module")
def plain(model):
    values = figures(model, INSIDE)
    assert 0 < values["relevance_mass"] < 1
    assert values["region_share"] == INSIDE.float().mean().item()
    return values


def tensor_of_png(masks):
    """As ToTensor gives a mask: whole numbers divided by 255."""
    return torch.stack([transforms.to_tensor(Image.fromarray(mask.byte().numpy())) for mask in masks])


def trimap(masks):
    """As of the Oxford pets: 1 the pet, 2 the background, 3 the border outside of the pet."""
    grown = torch.nn.functional.max_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0] > 0
    return torch.where(masks, 1, torch.where(grown, 3, 2))


def matte(masks):
    return torch.where(masks, 255, torch.where(trimap(masks) == 3, 128, 0))


def classes(masks):
    """Class indices, another class beside the label's, and 255 where nobody knows."""
    indices = masks * LABELS[:, None, None]
    indices[:, :2] = 7
    indices[:, 2:3] = 255
    return indices


def upper(masks):
    """The first two rows of each object."""
    return masks.long().cumsum(-2) < 3


KINDS = {
    "bool": lambda masks: masks,
    "uint8, 0/1": lambda masks: masks.byte(),
    "uint8, 0/255": lambda masks: masks.byte() * 255,
    "int64, one class": lambda masks: masks.long() * 3,
    "float, 0/1": lambda masks: masks.float(),
    "float, 0/255": lambda masks: masks.float() * 255,
    "half, 0/1": lambda masks: masks.half(),
    "as ToTensor gives 0/255": lambda masks: tensor_of_png(masks * 255),
    "as ToTensor gives 0/1": tensor_of_png,
    "with 255 for void": lambda masks: torch.where(trimap(masks) == 3, 255, masks.long()),
    "with -1 for void": lambda masks: torch.where(trimap(masks) == 3, -1, masks.long()),
    "trimap": trimap,
    "trimap as ToTensor gives it": lambda masks: tensor_of_png(trimap(masks)),
    "matte": matte,
    "class indices": classes,
    "class indices as ToTensor gives them": lambda masks: tensor_of_png(classes(masks)),
    "with a channel": lambda masks: masks[:, None],
    "saved as RGB": lambda masks: masks[:, None].expand(-1, 3, -1, -1).byte() * 255,
    "a list": list,
    "a list of objects": lambda masks: [torch.stack([mask, mask & upper(mask)]) for mask in masks],
    "tv_tensors.Mask": lambda masks: tv_tensors.Mask(masks.byte() * 255),
    "boxes (B, 4)": lambda _: BOXES,
    "boxes (B, 4), whole numbers": lambda _: BOXES.long(),
    "boxes (B, N, 4), padded with zeros": lambda _: torch.stack([BOXES, torch.zeros(2, 4)], 1),
    "boxes (B, N, 4), padded with -1": lambda _: torch.stack([BOXES, -torch.ones(2, 4)], 1),
    "a list of boxes (4,)": lambda _: list(BOXES),
    "a list of boxes (1, 4)": lambda _: list(BOXES[:, None]),
    "BoundingBoxes, XYWH": lambda _: tv_tensors.BoundingBoxes(
        torch.tensor([[8, 4, 20, 16], [2, 20, 12, 11]]), format="XYWH", canvas_size=(32, 32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_regions_of_every_kind_give_the_figures_of_bool_masks(kind, model, plain):
    assert figures(model, KINDS[kind](INSIDE)) == pytest.approx(plain)


def test_masks_resized_with_interpolation_are_read_at_one_half(model):
    small = INSIDE[:, ::2, ::2]
    for mode in ("bilinear", "bicubic"):
        large = interpolate(small[:, None].float(), (32, 32), mode=mode)
        for resized in (large, large * 255, (large * 255).clamp(0, 255).byte()):
            assert figures(model, resized) == figures(model, large[:, 0] > 0.5)


def test_masks_made_smaller_with_antialias_are_read_at_one_half(model):
    large = INSIDE.repeat_interleave(3, 1).repeat_interleave(3, 2)
    pictures = [Image.fromarray(mask.byte().numpy() * 255) for mask in large]
    for filter_ in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        small = torch.stack([transforms.pil_to_tensor(each.resize((41, 41), filter_)) for each in pictures])
        assert figures(model, small) == figures(model, small[:, 0] > 127)


def one_hot(masks):
    return torch.nn.functional.one_hot(masks * LABELS[:, None, None], 4).permute(0, 3, 1, 2)


def normalised(masks):
    return (masks.float() - 0.45) / 0.22


def resized(masks, mode="bilinear"):
    """Up to 40 px: an edge between classes 3 and 7 then holds a 5, and an edge of the void everything."""
    return interpolate(classes(masks)[:, None].float(), (40, 40), mode=mode)


REFUSED = {
    "class indices of others": (lambda m: 2 * classes(m), lambda m: classes(m) == LABELS[:, None, None]),
    "objects counted from 1": (lambda m: m.long() + (m & upper(m)), lambda m: m.long() + (m & upper(m)) > 0),
    "one channel per class": (one_hot, lambda m: one_hot(m)[range(2), LABELS]),
    "normalised as a picture": (normalised, lambda m: normalised(m) > 0),
    "NaN": (lambda m: torch.where(m, 1.0, torch.nan), lambda m: torch.where(m, 1.0, torch.nan) == 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_masks_that_no_convention_decides_are_refused_and_the_remedy_works(kind, model, plain):
    refused, remedy = REFUSED[kind]
    with pytest.raises(ValueError, match=r"Give (bool )?masks|give bool masks"):
        figures(model, refused(INSIDE))
    assert figures(model, remedy(INSIDE)) == pytest.approx(plain)


def test_class_indices_that_were_resized_with_interpolation_are_refused_and_the_remedy_works(model):
    with pytest.raises(ValueError, match="no convention says which of them are the object"):
        figures(model, resized(INSIDE))
    labelled = resized(INSIDE, "nearest")[:, 0] == LABELS[:, None, None]
    assert figures(model, labelled)["region_share"] == labelled.float().mean()


def test_two_classes_of_one_image_have_each_their_own_pixels(model):
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[2:12, 2:12], mask[20:30, 16:30], mask[12:14] = 1, 3, 255
    by_class = SESSMetric(CentreGaussian(), compare={}, limits={"": 0})
    by_hand = SESSMetric(CentreGaussian(), compare={}, limits={"": 0})
    image = picture(32, 32, 1)[None]
    by_class.update(model, image, LABELS, mask.expand(2, -1, -1))
    by_hand.update(model, image, LABELS, torch.stack([mask == 3, mask == 1]))
    assert by_class.compute() == by_hand.compute()


def test_the_functions_and_the_pointing_game_read_regions_alike():
    even = torch.ones(2, 32, 32)
    peaks = torch.zeros(2, 32, 32)
    peaks[:, 10, 10] = 1
    for kind in ("uint8, 0/255", "trimap", "matte", "with a channel", "boxes (B, 4)", "saved as RGB"):
        regions = KINDS[kind](INSIDE)
        assert relevance_mass(even, regions).tolist() == INSIDE.float().mean((1, 2)).tolist()
        assert pointing_hits(peaks, regions, 1.0).tolist() == [True, False]
        game = PointingGame(4, tolerance=1.0)
        game.update(peaks, regions, LABELS)
        assert (game.hits.tolist(), game.misses.tolist()) == ([0, 0, 0, 1], [0, 1, 0, 0])
