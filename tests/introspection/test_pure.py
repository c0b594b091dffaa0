from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torchvision import models

from sess_lightning import SESS, GradCAM, SESSMetric
from sess_lightning.introspection import lending
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.pure import pure_modules
from sess_lightning.methods import CAM, CentreGaussian, RandomMap
from sess_lightning.metrics.functional import insertion_curve
from sess_lightning.types import Explanation, SaliencyMethod

SMALLEST = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 32, "inception_v3": 96, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnet18": 32, "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32, "swin_t": 32, "swin_v2_t": 64, "vgg11": 32, "vit_b_32": 224,
}  # fmt: skip


def network(**options):
    torch.manual_seed(0)
    return models.resnet18(num_classes=5, **options)


def holds(model):
    """What a model holds: attributes by value, tensors by their identity and version, gradients."""
    held = []
    for module in model.modules():
        for name, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            for key, item in items:
                is_tensor = isinstance(item, torch.Tensor)
                held.append((name, key, id(item), (item._version, item.grad) if is_tensor else repr(item)))
    return held


@pytest.fixture
def unfilled(monkeypatch):
    """Weights are whatever memory holds: to fill them would take longest."""
    for name in (
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "trunc_normal_",
        "uniform_",
        "xavier_uniform_",
    ):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.usefixtures("unfilled")
def test_torchvisions_classifiers_change_nothing_and_draw_nothing(name):
    unset = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, **unset).eval()
    assert pure_modules(model) == [*model.modules()]
    before, drawn = holds(model), torch.get_rng_state()
    with torch.no_grad():
        model(torch.zeros(1, 3, SMALLEST[name], SMALLEST[name]))
    assert holds(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)


CURVES = lambda model, images, targets: insertion_curve(model, images, images[:, 0], targets, steps=2)  # noqa: E731
COMPARE = {"base": GradCAM(), "random": RandomMap(), "centre": CentreGaussian()}
METRIC = SESSMetric(SESS(GradCAM(), num_scales=2), compare=COMPARE, steps=2)
WAYS = {
    "Grad-CAM": GradCAM(), "CAM": CAM(), "SESS": SESS(GradCAM(), num_scales=2), "curves": CURVES,
    "SESSMetric": METRIC.update,
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_of_such_a_model_is_noted(way, monkeypatch):
    model, images, targets = network(), torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    model.layer1.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    way(model, images, targets)  # Finds the layer, once for all.
    before, drawn = holds(model), torch.get_rng_state()
    monkeypatch.setattr(lending, "State", lambda: pytest.fail("the model is noted"))
    way(model, images, targets)
    assert holds(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert not model.layer1.training


def test_maps_are_those_of_a_model_that_is_noted():
    class Own(models.ResNet):
        pass

    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    model = network()
    other = Own(models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=5)
    other.load_state_dict(model.state_dict())
    assert pure_modules(other) is None
    method = SESS(GradCAM("layer4"), num_scales=2)
    assert torch.equal(method(model, images, targets), method(other, images, targets))


def hooked(model):
    model.layer1.register_forward_hook(lambda *_: None)


def shadowed(model):
    model.layer1.forward = model.layer1.forward


def shadowed_within(model):
    model._forward_impl = model._forward_impl


def parametrized(model):
    parametrizations.weight_norm(model.fc)


def replaced(layer):
    def change(model):
        model.fc = layer()

    return change


def inferred(model):
    with torch.inference_mode():
        model.fc = nn.Linear(512, 5)


def subclassed():
    class Mine(nn.Linear):
        pass

    return Mine(512, 5)


def compiled(model):
    model.layer1.compile()


def of_another_kind(model):
    class Mine(nn.Parameter):
        pass

    model.fc.weight = Mine(model.fc.weight.detach())


CHANGES = {
    "hook": hooked, "forward": shadowed, "a method it calls": shadowed_within, "parametrized": parametrized,
    "compiled": compiled, "inference": inferred, "a kind of parameter": of_another_kind,
    "a subclass": replaced(subclassed), "recurrent": replaced(lambda: nn.LSTM(512, 5)),
    "embedding": replaced(lambda: nn.Embedding(5, 5, max_norm=1.0)),
    "lazy": replaced(lambda: nn.LazyLinear(5)),
    "random": replaced(lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_may_change_is_noted(change):
    model = network()
    assert pure_modules(model) is not None
    change(model)
    assert pure_modules(model) is None


WRAPPERS = {
    "scripted": torch.jit.script, "fx": torch.fx.symbolic_trace, "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_wraps_it_is_not_known(wrap):
    assert pure_modules(wrap(network().eval())) is None


def test_a_class_whose_forward_was_patched_is_not_known(monkeypatch):
    monkeypatch.setattr(models.resnet.Bottleneck, "forward", lambda _, images: images)
    assert pure_modules(models.resnet50(num_classes=5)) is None
    assert pure_modules(network()) is not None


def test_a_hook_on_all_modules_may_change_them():
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert pure_modules(network()) is None
    finally:
        handle.remove()


@dataclass(frozen=True)
class Careless(SaliencyMethod):
    """Leaves gradients, an attribute and a hook behind, as a user's method may."""

    def explain(self, model, images, targets):
        with torch.enable_grad():
            model(images)[:, 0].sum().backward()
        model.mark = 1
        model.layer1.register_forward_hook(lambda *_: None)
        torch.rand(1)
        return Explanation(images[:, 0], torch.ones(len(images)))


class CarelessCAM(GradCAM):
    def combine(self, features, gradients):
        torch.rand(1)
        return super().combine(features, gradients)


@pytest.mark.parametrize(
    "method", [SESS(Careless(), num_scales=1), CarelessCAM(), SESS(CarelessCAM())], ids=str
)
def test_what_somebody_elses_method_does_is_undone(method):
    model, images, targets = network().eval(), torch.rand(1, 3, 64, 64), torch.tensor([0])
    before, drawn = holds(model), torch.get_rng_state()
    method(model, images, targets)
    assert holds(model) == before
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("only_passes", [False, True])
def test_what_is_done_within_passes_may_still_be_noted(only_passes):
    model = network()
    before = holds(model)
    with explaining(model, only_passes):
        with explaining(model):
            model.mark, model.fc.bias.grad = 1, torch.ones(5)
            with explaining(model, only_passes=True):
                assert model.mark == 1
        assert hasattr(model, "mark") is not only_passes  # Else the outer one puts back.
    assert holds(model) == before
