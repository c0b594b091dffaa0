import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import get_model

from formula import build, picture
from sess_lightning.methods import GuidedBackprop
from sess_lightning.methods.gradient import guided_relu


def made(name):
    """A torchvision model for 64 px and 7 classes, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_model(
            name, num_classes=7, **({"init_weights": False} if name == "googlenet" else {})
        ).eval()


def guided_gradients(model, images, targets):
    pixels = images.clone().requires_grad_()
    with guided_relu():
        logits = model(pixels)
    return torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), pixels)[0]


def plain_gradients(model, images, targets):
    pixels = images.clone().requires_grad_()
    return torch.autograd.grad(model(pixels).gather(1, targets[:, None]).sum(), pixels)[0]


RELUS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu, named": lambda x: F.relu(input=x),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": torch.Tensor.relu,
    "Tensor.relu_": torch.Tensor.relu_,
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu6": F.relu6,
    "F.relu6, named": lambda x: F.relu6(input=x, inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_every_way_to_write_a_relu_lets_only_positive_gradients_back(relu):
    leaf = torch.tensor([-1.0, 1.0, 2.0, 3.0, 7.0], requires_grad=True)
    with guided_relu():
        out = relu(leaf.clone())
    top = 6.0 if out[-1] == 6 else 7.0
    assert out.tolist() == [0, 1, 2, 3, top]
    (gradient,) = torch.autograd.grad(out, leaf, torch.tensor([1.0, -1.0, 5.0, 0.5, 2.0]))
    assert gradient.tolist() == [0, 0, 5, 0.5, 0 if top == 6 else 2]


@pytest.mark.parametrize("other", [F.hardtanh, F.silu, F.gelu, F.hardswish, torch.sigmoid])
def test_other_activations_keep_their_own_gradient(other):
    leaf = torch.linspace(-3, 3, 9, requires_grad=True)
    (expected,) = torch.autograd.grad(other(leaf), leaf, -torch.ones(9))
    with guided_relu():
        out = other(leaf)
    assert torch.equal(torch.autograd.grad(out, leaf, -torch.ones(9))[0], expected)


def test_an_in_place_relu_whose_result_is_ignored_still_counts():
    leaf = torch.tensor([-1.0, 2.0], requires_grad=True)
    with guided_relu():
        x = leaf * 1
        nn.ReLU(inplace=True)(x)
        out = x * 3
    assert out.tolist() == [0, 6]
    assert torch.autograd.grad(out, leaf, torch.tensor([1.0, -1.0]))[0].tolist() == [0, 0]


def test_outside_relus_are_plain_again_even_after_an_error():
    with pytest.raises(KeyError), guided_relu():
        raise KeyError
    leaf = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(F.relu(leaf), leaf, -torch.ones(1))[0].item() == -1


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_guided_gradients_are_captums(name):
    captum = pytest.importorskip("captum.attr")
    model, images = made(name), torch.stack([picture(64, 64, 1), picture(64, 64, 2)])
    targets = torch.tensor([0, 3])
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
        expected = captum.GuidedBackprop(model).attribute(images.clone(), targets)
    got = guided_gradients(model, images, targets)
    assert expected.abs().amax() > 0
    torch.testing.assert_close(got, expected, atol=1e-6 * expected.abs().amax().item(), rtol=0)


class Spelled(nn.Module):
    """The same network with its ReLUs as modules, or as functions that no hook can see."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 5, 2), nn.Conv2d(8, 8, 3)
        self.relu, self.head = relu, nn.Linear(8, 5)

    def forward(self, images):
        return self.head(self.relu(self.second(self.relu(self.first(images)))).mean((2, 3)))


@pytest.mark.parametrize(("function", "module"), [(F.relu, nn.ReLU()), (F.relu6, nn.ReLU6())])
def test_functional_relus_are_guided_as_modules_are(function, module):
    modules, functions = Spelled(module), Spelled(function)
    functions.load_state_dict(modules.state_dict())
    images, targets = picture(64, 64, 1)[None], torch.tensor([2])
    got, expected = (guided_gradients(model, images, targets) for model in (functions, modules))
    assert torch.equal(got, expected)
    assert not torch.allclose(got, plain_gradients(functions, images, targets), atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [("densenet121", 121), ("mobilenet_v2", 35), ("googlenet", 57)])
def test_every_relu_of_a_model_is_guided(name, count, monkeypatch):
    model = made(name)
    calls, apply = [], guided_relu.__torch_function__

    def count_relus(self, func, types, args=(), kwargs=None):
        relu = func in self._PLAIN | self._IN_PLACE | {F.hardtanh}
        calls.extend([func] * relu)
        return apply(self, func, types, args, kwargs)

    monkeypatch.setattr(guided_relu, "__torch_function__", count_relus)
    images, targets = picture(64, 64, 1)[None], torch.tensor([2])
    guided = guided_gradients(model, images, targets)
    assert len(calls) == count
    assert not torch.allclose(
        guided, plain_gradients(model, images, targets), atol=1e-6 * guided.abs().amax().item()
    )


def test_the_map_sums_channels_and_is_clipped_at_its_99th_percentile(tiny, images, targets):
    gradients = guided_gradients(tiny, images, targets).abs().sum(1)
    top = torch.quantile(gradients.flatten(1), 0.99, dim=1)[:, None, None]
    expected = gradients.clamp(max=top)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    maps = GuidedBackprop()(tiny, images, targets)
    torch.testing.assert_close(maps, (expected - low) / (high - low), atol=1e-5, rtol=0)
    assert (maps[0] == 1).sum() == 502  # One in a hundred of 224 x 224.


def test_a_model_of_no_relu_gets_its_plain_gradient(images, targets):
    model = build("tiny")
    linear = nn.Sequential(model.features[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    assert torch.equal(guided_gradients(linear, images, targets), plain_gradients(linear, images, targets))
