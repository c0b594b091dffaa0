import pytest
import torch
from torch import nn

from formula import picture
from lightning_models import filled_net
from odd_models import Queries, Recurrent, Tokens
from sess_lightning import SESS
from sess_lightning.introspection.grids import Grid
from sess_lightning.introspection.layers import OnGrid
from sess_lightning.methods import (
    RISE,
    Blurred,
    Captum,
    ContrastiveSESS,
    GradCAM,
    Gradient,
    GroupCAM,
    PytorchGradCAM,
    RandomMap,
)
from sess_lightning.methods.choosing import check_layers, default_method, find_layers

IMAGE = picture(48, 48, 1)[None]


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 48 * 48, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)
    ).eval()


def test_a_network_without_places_is_explained_by_gradients():
    net = mlp()
    method = default_method(net, IMAGE)
    assert str(method) == "SESS(Gradient())"
    assert method(net, IMAGE, torch.tensor([1])).shape == (1, 48, 48)


@pytest.mark.parametrize("net", [filled_net, Tokens, Queries, Recurrent], ids=lambda net: net.__name__)
def test_any_other_network_is_explained_by_grad_cam_or_said_why_not(net):
    assert default_method(net(), IMAGE) == SESS(GradCAM())


class Failing(nn.Module):
    def forward(self, images):
        raise RuntimeError("out of luck")


def test_what_fails_is_left_to_the_run_to_say():
    assert default_method(Failing(), IMAGE) == SESS(GradCAM())


@pytest.mark.parametrize(
    ("method", "count"),
    [(SESS(GradCAM()), 1), (Blurred(SESS(GroupCAM(4))), 1), (SESS(GradCAM("3")), 0), (RISE(), 0)],
    ids=["within", "deep within", "named", "none"],
)
def test_layers_that_are_not_named_are_found_once_and_before(method, count):
    passed, net = [], filled_net()
    net.register_forward_hook(lambda *_: passed.append(1))
    find_layers(net, IMAGE, method, RandomMap())
    assert len(passed) == count
    find_layers(net, IMAGE, method)
    assert len(passed) == count
    find_layers(Failing(), IMAGE, method)  # What fails is left to the run, too.


WRONG = [
    GradCAM("6.conv"),
    SESS(GradCAM("6.conv")),
    ContrastiveSESS(GradCAM("6.conv", of="log_odds")),
    Blurred(SESS(GroupCAM(4, "6.conv"))),
    GradCAM(OnGrid("6.conv", Grid("channels", 8, 8))),
    Captum("LayerGradCam", target_layer="6.conv"),
    SESS(PytorchGradCAM("GradCAMPlusPlus", target_layer="6.conv")),
]


@pytest.mark.parametrize("method", WRONG, ids=str)
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(method):
    with pytest.raises(ValueError, match=r"target_layer '6\.conv' is unknown; this model has, among"):
        check_layers(filled_net(), RandomMap(), method)


def test_other_packages_methods_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="captum has no 'LayerGradCamera'"):
        check_layers(filled_net(), SESS(Captum("LayerGradCamera")))


def test_layers_that_exist_are_let_pass_and_nothing_is_run():
    net = filled_net()
    net.register_forward_hook(lambda *_: pytest.fail("it was run"))
    check_layers(net, SESS(GradCAM("3")), GradCAM(net[3]), RISE(), SESS(Gradient()), GradCAM(),
                 Captum("LayerGradCam", target_layer="3"))  # fmt: skip
