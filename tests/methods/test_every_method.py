"""What must hold of every method there is; a new name in ``methods.__all__`` is taken in by itself."""

from contextlib import nullcontext
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from every_method import ARGUMENTS, ON_DEVICE, made
from formula import Tiny, fill, picture
from precision import precision_flags
from sess_lightning import methods
from sess_lightning.batching import ON_CPU
from sess_lightning.cost.measuring import forwards_of
from sess_lightning.methods import SESS, AugmentedGradCAM, Blurred, SmoothGrad
from sess_lightning.methods.templates import ExtractingMethod
from sess_lightning.metrics import SESSMetric
from sess_lightning.types import SaliencyMethod

NEEDS = {"Captum": "captum", "PytorchGradCAM": "pytorch_grad_cam"}
SIZE = 64


every_method = pytest.mark.parametrize("name", methods.__all__)


@pytest.fixture(autouse=True)
def _installed(request):
    if "name" in request.fixturenames:
        pytest.importorskip(NEEDS.get(request.getfixturevalue("name"), "torch"))


@pytest.fixture
def images():
    return torch.stack([picture(SIZE, SIZE, 1), picture(SIZE, SIZE, 2)])


@pytest.fixture
def model():
    return fill(Restless())


class Restless(Tiny):
    """``tiny`` for small pictures, with what a forward may change; fails when told to."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 24, 3, 2, 1), nn.ReLU()
        )
        self.register_buffer("forwards", torch.zeros(()))
        self.log = []
        self.fails_at = None

    def forward(self, images):
        self.forwards += 1
        self.log.append(len(images))
        features = self.features(images)
        torch.rand(3)
        if self.fails_at is not None and next(self.fails_at) == 0:
            raise KeyError("half-way")
        return self.fc(features.mean((2, 3)))


def plain(tensor):
    return None if tensor is None else (id(tensor), tensor.requires_grad, tensor.tolist())


def snapshot(model):
    """All that a user could miss: values, gradients, modes, hooks, attributes, chance, settings."""
    found = {
        # Python's own generator is left out: the run-time checks of types draw from it.
        "chance": (torch.get_rng_state().tolist(), str(np.random.get_state())),  # noqa: NPY002
        "gradients on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "settings": (precision_flags(), torch.backends.mha.get_fastpath_enabled()),
        "log": list(model.log),
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = plain(tensor), plain(tensor.grad)
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if key.endswith("hooks")}
        found[f"{name}:"] = module.training, sorted(vars(module)), list(map(id, module.children())), hooks
    return found


@every_method
@pytest.mark.parametrize("fails_at", [None, 1, 2], ids=["runs", "fails at once", "fails later"])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_bit_identical_even_after_an_exception_half_way(
    name, fails_at, context, model, images
):
    model.train()
    model.features[1].eval()  # As a user freezes batch norm.
    model.features[0].weight.requires_grad_(False)
    model.fc.weight.grad = torch.full_like(model.fc.weight, 7)
    if fails_at is not None:
        model.fails_at = count(1 - fails_at)
    before, pixels = snapshot(model), images.clone()
    with context():
        inside = snapshot(model)
        try:
            made(name).explain(model, images, torch.tensor([0, 1]))
        except KeyError:
            assert fails_at is not None
        assert snapshot(model) == inside
    assert snapshot(model) == before
    assert torch.equal(images, pixels)


@every_method
def test_maps_are_finite_and_scores_are_the_models(name, model, images):
    targets = torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(images).softmax(1)[[0, 1], targets]
    method = made(name)
    explanation = method.explain(model, images, targets)
    assert explanation.maps.shape == (2, SIZE, SIZE)
    assert explanation.maps.dtype == explanation.scores.dtype == torch.float32
    assert explanation.maps.isfinite().all()
    assert 0 <= explanation.maps.amin() <= explanation.maps.amax() <= 1
    torch.testing.assert_close(explanation.scores, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method(model, images, targets), explanation.maps)


@every_method
def test_dead_pictures_and_dead_models_give_finite_maps(name, model, images):
    targets = torch.tensor([0, 1])
    flat = torch.zeros_like(images)
    assert made(name)(model, flat, targets).isfinite().all()
    with torch.no_grad():
        for parameter in model.features.parameters():
            parameter.zero_()  # Nothing but a bias in the head: no features, no gradients.
    assert made(name)(model, images, targets).isfinite().all()


@every_method
def test_forwards_are_counted(name, model, images):
    method = made(name)
    method(model, images[:1], torch.tensor([0]))  # The layer is found once.
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    told = method.count_forwards(model, (SIZE, SIZE))
    seen.clear()
    method(model, images[:1], torch.tensor([0]))
    assert told == sum(seen)


def images_seen(model, call):
    """Return how many images pass through a model."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    call()
    handle.remove()
    return sum(seen)


@every_method
def test_a_forward_pass_for_scores_runs_only_where_scores_are_read(name, model, images):
    method, image, target = made(name), images[:1], torch.tensor([0])
    method(model, image, target)  # The layer is found once.
    told = method.count_forwards(model, (SIZE, SIZE))
    apart = int(method.scores_apart)
    assert images_seen(model, lambda: method.explain(model, image, target)) == told + apart
    assert images_seen(model, lambda: method.extract(model, image.clone(), target)) == told + apart
    classes = torch.tensor([0, 1, 2])
    seen = images_seen(model, lambda: method.maps_beside(model, image, classes))
    assert seen == told * (1 if method.shares_classes else 3)
    around = [Blurred(method), SmoothGrad(method, 2), AugmentedGradCAM(method, 2, steps=1)]
    around.append(SESS(method, num_scales=2, prefilter_ratio=0.5))
    for wrapped in around:
        told = wrapped.count_forwards(model, (SIZE, SIZE))
        assert images_seen(model, lambda: wrapped(model, image, target)) == told  # noqa: B023
        scored = images_seen(model, lambda: wrapped.explain(model, image, target))  # noqa: B023
        assert scored == told + wrapped.scores_apart


@every_method
def test_under_sess(name, model, images):
    targets = torch.tensor([0, 1])
    maps = SESS(made(name), num_scales=2, prefilter_ratio=0.5, batch_size=4)(model, images, targets)
    assert maps.shape == (2, SIZE, SIZE)
    assert maps.isfinite().all()
    if name != "XRAI":
        assert maps.amax((1, 2)).min() > 0.99
    # One window that is the whole picture: SESS is its base.
    base = made(name)(model, images, targets)
    torch.testing.assert_close(
        SESS(made(name), num_scales=1)(model, images, targets), base, atol=1e-4, rtol=0
    )


@every_method
def test_the_layout_of_model_and_images_changes_nothing(name, images):
    targets = torch.tensor([0, 1])
    last = torch.channels_last
    expected = made(name)(fill(Restless()), images, targets)
    got = made(name)(fill(Restless()).to(memory_format=last), images.contiguous(memory_format=last), targets)
    # Adam takes whole steps where only rounding gives a gradient its sign: on single pixels.
    few = 0.01 if name == "AugmentedGradCAM" else 0
    assert ((got - expected).abs() > 1e-4).float().mean() <= few


@every_method
def test_in_the_metric(name, model, images):
    metric = SESSMetric(made(name), steps=2)
    regions = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    regions[:, 16:48, 16:48] = True
    metric.update(model, images, torch.tensor([0, 1]), regions)
    values = metric.compute()
    assert {"insertion", "deletion", "overall", "pointing_game"} <= values.keys()
    assert values["n"] == 2
    assert all(np.isfinite(values[key]) for key in ("insertion", "deletion", "overall", "pointing_game"))


def told(method):
    """A method as a user writes it in YAML."""
    names = [name for name in methods.__all__ if type(method) is getattr(methods, name)]
    values = {
        name: told(value) if isinstance(value, SaliencyMethod) else value
        for name, value in ARGUMENTS.get(names[0], {}).items()
    }
    return {"class_path": f"sess_lightning.methods.{names[0]}"} | ({"init_args": values} if values else {})


def instantiated(parser, config):
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    return instantiate(config).method


@every_method
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in SESS"])
def test_from_yaml(name, nested, tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    yaml = pytest.importorskip("yaml")
    config = told(made(name))
    if nested:
        config = {
            "class_path": "sess_lightning.methods.SESS",
            "init_args": {"base": config, "scales": [64, 96]},
        }
    plain = yaml.safe_dump({"method": config}, default_flow_style=None).replace("!!python/tuple ", "")
    path = tmp_path / "method.yaml"
    path.write_text(plain)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SaliencyMethod, "method")
    got = instantiated(parser, parser.parse_args([f"--config={path}"]))
    assert got == (SESS(made(name), scales=(64, 96)) if nested else made(name))


@pytest.mark.usefixtures("unchecked")
def test_methods_are_named_on_a_command_line():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(SaliencyMethod, "method")
    given = ["--method=SESS", "--method.base=LayerCAM", "--method.base.target_layer=features.3"]
    got = instantiated(parser, parser.parse_args(given))
    assert got == SESS(methods.LayerCAM("features.3"))


def test_a_target_layer_from_yaml_is_a_name():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(SaliencyMethod, "method")
    text = {
        "class_path": "sess_lightning.methods.SESS",
        "init_args": {
            "base": {
                "class_path": "sess_lightning.methods.LayerCAM",
                "init_args": {"target_layer": "features.3"},
            }
        },
    }
    got = instantiated(parser, parser.parse_object({"method": text}))
    assert got == SESS(methods.LayerCAM("features.3"))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ON_DEVICE)
def test_the_device_needs_no_float64(name, images, targets, model, without_float64):
    method = made(name)
    method(model, images, targets)  # What follows from the size alone is computed on the host.
    with without_float64:
        method(model, images, targets)


@pytest.mark.parametrize(
    "name", [name for name in methods.__all__ if issubclass(getattr(methods, name), ExtractingMethod)]
)
def test_a_large_batch_passes_in_parts_and_gives_the_same_maps(name, model, images, monkeypatch):
    monkeypatch.setattr("sess_lightning.batching.MOST_ON_CPU", ON_CPU)
    method, many = made(name), images.repeat(10, 1, 1, 1)[:19]
    targets = torch.arange(len(many)) % 3
    maps = []
    seen = forwards_of(model, lambda: maps.append(method(model, many, targets)))
    assert max(len(batch) for batch in seen.batches) <= (32 if name == "IntegratedGradients" else ON_CPU)
    singles = (many[[i]].contiguous(memory_format=torch.channels_last) for i in (0, 9, 18))
    alone = torch.cat(
        [method(model, image, targets[[i]]) for i, image in zip((0, 9, 18), singles, strict=True)]
    )
    torch.testing.assert_close(maps[0][[0, 9, 18]], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_no_method_waits_for_the_device_once_it_knows_the_model(name, model, images, targets, sync_spy):
    method = made(name)
    method(model, images, targets)
    with sync_spy:
        method(model, images, targets)
