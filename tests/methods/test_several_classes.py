import pytest
import torch

from formula import build, picture
from sess_lightning import SESS, SESSMetric
from sess_lightning.methods import GradCAM, GuidedBackprop, LayerCAM


@pytest.fixture
def seen():
    return {"forwards": 0}


@pytest.fixture
def model(seen):
    tiny = build("tiny")
    tiny.register_forward_hook(lambda _, inputs, __: seen.update(forwards=seen["forwards"] + len(inputs[0])))
    return tiny


@pytest.fixture
def image():
    return torch.as_tensor(picture(224, 224, 1))[None]


TARGETS = torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("base", "forwards"),
    [(GradCAM("features.5"), 5), (LayerCAM("features.5"), 5), (GuidedBackprop(), 5 + 3 * 5)],
    ids=lambda case: type(case).__name__,
)
def test_an_images_windows_pass_once_for_all_of_its_classes(model, image, seen, base, forwards):
    method = SESS(base, num_scales=2)
    one_by_one = [method.explain(model, image, target[None]) for target in TARGETS]
    seen["forwards"] = 0
    maps, scores = method.explain_classes(model, image, TARGETS)
    assert seen["forwards"] == forwards
    assert torch.equal(maps, torch.cat([each.maps for each in one_by_one]))
    assert torch.equal(scores, torch.cat([each.scores for each in one_by_one]))


def test_a_metric_scores_several_classes_of_one_image_as_it_does_one_by_one(model, image):
    together, apart = (SESSMetric(SESS(GradCAM("features.5"), num_scales=2), steps=4) for _ in range(2))
    together.update(model, image, TARGETS)
    for target in TARGETS:
        apart.update(model, image, target[None])
    # One image, or three: the intervals, which draw images, have to differ.
    means, expected = (
        {name: value for name, value in metric.compute().items() if "_ci_" not in name}
        for metric in (together, apart)
    )
    assert means == pytest.approx(expected, abs=1e-6)
