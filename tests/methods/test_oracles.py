"""Whole methods against other libraries' whole methods, on the same network and images."""

import numpy as np
import pytest
import torch

from formula import TARGET_LAYERS, build, picture
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import SESS, XRAI, GradCAM, ScoreCAM
from sess_lightning.ops import min_max, upsample


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_sess_is_grad_cams(name, ratio):
    foreign = pytest.importorskip("pytorch_grad_cam")
    if not hasattr(foreign, "SESS"):
        pytest.skip("grad-cam has a SESS since 1.5.7")
    model, layer = build(name), TARGET_LAYERS[name]
    images = torch.stack([picture(224, 224, 1), picture(224, 224, 3)])
    targets = model(images).argmax(1)
    outputs = [foreign.utils.model_targets.ClassifierOutputTarget(target) for target in targets.tolist()]
    oracle = foreign.SESS(
        model, [model.get_submodule(layer)], num_scales=3, pre_filter_ratio=ratio, smooth=False
    )
    expected = torch.from_numpy(oracle(images, outputs))
    model.zero_grad(set_to_none=True)
    got = SESS(GradCAM(layer), num_scales=3, prefilter_ratio=ratio)(model, images, targets)
    # It counts what exceeds 0, this package what exceeds rounding: lone pixels may differ. Measured: 1.4e-6.
    assert ((got - expected).abs() > 1e-4).float().mean() < 1e-3


def test_score_cam_is_torchcams():
    foreign = pytest.importorskip("torchcam.methods")
    model, images, targets = mobilenet(), cats(64), torch.tensor([TABBY, EGYPTIAN_CAT])
    layer = "features.7.conv.1"
    expected = []
    for image, target in zip(images.split(1), targets.tolist(), strict=True):
        with foreign.ScoreCAM(model, layer, batch_size=64) as oracle, torch.no_grad():
            model(image)
            expected.append(oracle(target)[0][0])
    expected = min_max(upsample(torch.stack(expected), (64, 64)))
    got = ScoreCAM(layer, weighting="softmax", batch_size=64)(model, images, targets)
    # It stretches a channel before it is enlarged, this package, as the authors' code, after: 0.9993.
    for one, other in zip(got, expected, strict=True):
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.998


def test_xrai_is_the_authors():
    saliency = pytest.importorskip("saliency.core")
    # Theirs takes seconds a picture; of several, test_regions.py compares each with the formula.
    model, image, target = mobilenet(), cats(224)[:1], torch.tensor([TABBY])
    method = XRAI(steps=4)
    attribution = method.attributions(model, image, target)[0].numpy()
    expected = saliency.XRAI().GetMask(
        image[0].permute(1, 2, 0).numpy(), None, base_attribution=np.repeat(attribution[..., None], 3, 2)
    )
    (got,) = method(model, image, target)
    assert np.corrcoef(got.flatten(), expected.flatten())[0, 1] > 0.999
