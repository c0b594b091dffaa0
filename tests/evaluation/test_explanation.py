from dataclasses import replace

import pytest
import torch

from formula import build
from layouts import photograph
from sess_lightning.evaluation.explanation import explain_image
from sess_lightning.evaluation.weights import Network
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.types import SESSWarning

SMALL = SESS(GradCAM(), num_scales=2, window=64)


@pytest.fixture
def network():
    return Network(build("tiny"), (0.5,) * 3, (0.5,) * 3, ("a", "b", "c", "d", "e"))


@pytest.fixture
def file(tmp_path):
    photograph("chelsea").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_a_class_is_given_by_name_by_index_or_predicted(file, network):
    predicted = explain_image(file, network, GradCAM(), size=64)
    named = explain_image(file, network, GradCAM(), "abcde"[predicted.target], size=64)
    numbered = explain_image(file, network, GradCAM(), predicted.target, size=64)
    others = [explain_image(file, network, GradCAM(), i, size=64).probability for i in range(5)]
    assert predicted.target == named.target == numbered.target
    assert max(others) == predicted.probability
    assert sum(others) == pytest.approx(1, abs=1e-6)  # Five roundings of float32.


@pytest.mark.parametrize(("sign", "predicted"), [(1, 1), (-1, 0)])
def test_a_single_logit_predicts_either_of_two_classes(file, network, sign, predicted):
    class OneLogit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network.model

        def forward(self, images):
            return sign * self.net(images)[:, :1].abs()

    explained = explain_image(file, network._replace(model=OneLogit()), GradCAM(), size=64)
    assert explained.target == predicted
    assert explained.probability > 0.5


def test_probabilities_that_are_read_as_logits_are_warned_of(file, network):
    ending = torch.nn.Sequential(network.model, torch.nn.Softmax(1))
    with pytest.warns(SESSWarning, match="explain_image: the model returns probabilities"):
        explain_image(file, network._replace(model=ending), GradCAM("0.features"), size=64)


def test_the_base_stands_beside_sess(file, network):
    explained = explain_image(file, network, SMALL, "b", size=64)
    assert list(explained.maps) == list(explained.panel.overlays) == ["GradCAM", "SESS"]
    assert explained.panel.label == "b"
    assert explained.panel.title == "cat.png"
    assert explained.panel.caption.splitlines() == [
        "target: b", f"probability: {explained.probability:.3f}", "GradCAM()", str(SMALL),
    ]  # fmt: skip
    alone = explain_image(file, network, GradCAM(), "b", size=64)
    assert torch.equal(alone.maps["GradCAM"], explained.maps["GradCAM"])


def test_sess_is_smoothed_once(file, network):
    plain = explain_image(file, network, SMALL, 1, size=64)
    smoothed = explain_image(file, network, replace(SMALL, smoothing=True), 1, size=64)
    assert torch.equal(plain.maps["SESS"], smoothed.maps["SESS"])


def test_classes_without_names_are_numbered(file, network):
    for few in ((), ("a", "b")):
        explained = explain_image(file, network._replace(class_names=few), GradCAM(), 3, size=64)
        assert explained.panel.label == "class 3"
    with pytest.raises(ValueError, match="'cat' is not one of the 0 class names; give an index"):
        explain_image(file, network._replace(class_names=()), GradCAM(), "cat", size=64)
