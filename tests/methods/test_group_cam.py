import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from formula import build, picture
from sess_lightning.methods import GroupCAM
from sess_lightning.ops import blur, min_max


def by_hand(model, image, target, groups, layer):
    """Group-CAM one group after the other, the whole graph, one image."""
    held = []
    handle = layer.register_forward_hook(lambda *call: held.append(call[2]) or call[2].clone())
    logits = model(image)
    handle.remove()
    (gradients,) = torch.autograd.grad(logits[0, target], held[0])
    weighted = (gradients.mean((2, 3), keepdim=True) * held[0]).detach()
    blurred, total = blur(image, 51, 50.0), torch.zeros(1, *image.shape[-2:])
    probability = [model(x).softmax(1)[0, target].item() for x in (image, blurred)]
    for group in weighted.chunk(groups, 1):
        drawn = F.interpolate(group.sum(1, keepdim=True).relu(), image.shape[-2:], mode="bilinear")[:, 0]
        if drawn.amax() == drawn.amin():
            continue
        mask = (drawn - drawn.amin()) / (drawn.amax() - drawn.amin())
        masked = image * mask + blurred * (1 - mask)
        gain = model(masked).softmax(1)[0, target].item() - probability[1]
        total += max(gain, 0) * drawn
    return min_max(total)[0], probability[0]


@pytest.mark.parametrize(("groups", "target"), [(8, 2), (24, 2), (32, 0), (5, 2)])
def test_group_cam_is_its_paper_by_hand(groups, target):
    model, image = build("tiny"), picture(224, 224, 2)[None]
    expected, probability = by_hand(model, image, target, groups, model.features[5])
    maps, scores = GroupCAM(groups, "features.5").explain(model, image, torch.tensor([target]))
    assert expected.amax() == 1
    torch.testing.assert_close(maps[0], expected, atol=1e-4, rtol=0)
    assert scores.item() == pytest.approx(probability, abs=1e-6)


def test_a_batch_is_its_images_one_by_one_whatever_the_batch_size(tiny, images):
    targets = torch.tensor([2, 0])
    got = GroupCAM(8, "features.5", batch_size=3)(tiny, images, targets)
    for i in range(2):
        one = GroupCAM(8, "features.5", batch_size=64)(tiny, images[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(got[i], one[0], atol=1e-5, rtol=0)


def test_a_group_that_reveals_nothing_scores_nothing(tiny, images):
    tiny.fc.weight.data = tiny.fc.weight.data.abs()
    tiny.fc.weight.data[1:] = 0
    tiny.features[4].weight.data[:3] = 0  # The first of 8 groups is dead.
    tiny.features[4].bias.data[:3] = -1
    maps = GroupCAM(8, "features.5")(tiny, images, torch.tensor([0, 0]))
    assert maps.isfinite().all()
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1])


def test_without_evidence_the_map_is_all_zeros(tiny, images):
    tiny.fc.weight.data = -tiny.fc.weight.data.abs()
    assert torch.equal(
        GroupCAM(8, "features.5")(tiny, images, torch.tensor([0, 1])), torch.zeros(2, 224, 224)
    )


def test_each_image_costs_two_forwards_and_one_per_group(tiny, images, targets):
    sizes = []
    tiny.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    method = GroupCAM(8, "features.5", batch_size=6)
    method(tiny, images, targets)
    assert method.forwards == 10
    assert sizes == [2, 2, 6, 6, 4]
