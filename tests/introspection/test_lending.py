import contextlib
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import pytest
import torch
from torch import nn
from torchmetrics import CatMetric

from precision import precision_flags
from sess_lightning import SESSMetric
from sess_lightning.introspection.layers import find_target_layer
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.methods import RISE, SESS, GradCAM, GroupCAM, GuidedBackprop
from small_nets import METHODS, Net, made, maps_of, method_cases, same


class Restless(Net):
    """Writes whatever a forward can write to, draws random numbers, and fails when told to."""

    def __init__(self):
        super().__init__()
        self.features.insert(1, nn.BatchNorm2d(8))
        self.features.append(nn.Dropout(0.5))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("unset", None)
        self.total = torch.zeros(2)
        self.calls, self.seen, self.cache = 0, [], {}

    def forward(self, images):
        self.count += 1
        self.mean, self.unset = images.mean(), images.std()
        self.total += 1
        self.calls += 1
        self.seen.append(images)
        self.cache[len(self.cache)] = images
        features = self.features(images)
        self.last = features
        torch.rand(3)
        if next(self.fails):
            raise KeyError("half-way")
        return self.classify(features)

    fails = repeat(False)


def settings():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attention": torch.backends.mha.get_fastpath_enabled(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "precision": precision_flags(),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "random": torch.get_rng_state().tolist(),
    }


def plain(value):
    """Something that compares by what a value is and by which object holds it."""
    if isinstance(value, torch.Tensor):
        return id(value), value.requires_grad, value.detach().tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return id(value), [plain(item) for item in value]
    return value


def state(model):
    """All there is on a model: modes, parameters, buffers, attributes, hooks, gradients."""
    return {
        name: (plain(vars(module)), [plain(p.grad) for p in module.parameters(recurse=False)])
        for name, module in model.named_modules()
    }


@pytest.fixture
def restless():
    model = made(Restless).train()
    model.features[1].eval()  # As a user freezes batch norm.
    model.features[0].weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 7)
    return model


CONTEXTS = {"plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@method_cases
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_everything_is_given_back(restless, images, method, context, fails):
    with context():
        before = state(restless), settings(), plain(images)
        with pytest.raises(KeyError, match="half-way") if fails else contextlib.nullcontext():
            if fails:
                # SESS and Group-CAM fail at their second forward, the others at their only one.
                restless.fails = chain([False] * isinstance(method, SESS | GroupCAM), repeat(True))
            method(restless, images, torch.tensor([0, 1]))
        vars(restless).pop("fails", None)
        assert (state(restless), settings(), plain(images)) == before


def test_finding_a_layer_gives_everything_back(restless, images):
    before = state(restless), settings()
    assert find_target_layer(restless, images) is restless.features[4]
    assert (state(restless), settings()) == before


def test_inside_all_modules_are_in_eval_mode_with_gradients_and_outside_modes_are_their_own(restless):
    before = [module.training for module in restless.modules()]
    assert len(set(before)) == 2
    with torch.inference_mode(), explaining(restless):
        assert not any(module.training for module in restless.modules())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_cache_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert [module.training for module in restless.modules()] == before


def test_parameters_that_a_sharded_models_forward_swaps_are_left_to_it(images):
    class FSDPModule:
        """By this name torch's FSDP is known."""

    class Unsharding(FSDPModule, Net):
        def forward(self, images):
            self.head._parameters["weight"] = self.whole
            return super().forward(images)

    model = made(Unsharding)
    vars(model)["whole"] = nn.Parameter(model.head.weight.detach() * 2)
    GradCAM("features")(model, images, torch.tensor([0, 1]))
    assert model.head.weight is model.whole


def test_a_metric_of_ours_that_is_a_part_of_the_model_keeps_what_it_is_told_inside(images):
    model = made(Net)
    model.metric, model.other = SESSMetric(GradCAM()), CatMetric()
    with explaining(model):
        model.other.update(torch.tensor([3.0, 4.0]))
    model.metric.update(model, images, torch.tensor([0, 1]))
    assert model.metric.summary().values["n"] == 2
    assert model.other.value == []


def test_an_overridden_train_is_not_called_since_it_may_not_be_undone():
    class Merging(Net):
        def train(self, mode=True):
            raise AssertionError("called")

    with explaining(Merging()) as model:
        assert not model.training
    assert model.training


def test_lending_what_is_lent_already_changes_nothing(restless):
    with explaining(restless), explaining(restless):
        pass
    with explaining(restless):
        with explaining(restless):
            pass
        assert not restless.training
    assert restless.training


@pytest.mark.parametrize("method", [GradCAM(), RISE(num_masks=4)], ids=repr)
def test_threads_take_turns_with_a_model(method, images):
    class Slow(Net):
        running = 0

        def forward(self, images):
            Slow.running += 1
            time.sleep(0.002)  # Another thread would come in between.
            alone, Slow.running = Slow.running == 1, Slow.running - 1
            return super().forward(images) if alone else None

    model = made(Slow).train()
    expected = method(model, images, torch.tensor([0, 1]))
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda _: method(model, images, torch.tensor([0, 1])), range(12)))
    assert all(torch.equal(one, expected) for one in maps)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_borrowed_tensor_is_a_copy_that_autograd_takes(images):
    with torch.inference_mode():
        inferred = images * 1
        with torch.inference_mode(False):
            copy_ = borrowed(inferred)
            assert not copy_.is_inference()
            assert torch.equal(copy_, images)
    borrowed(images).zero_()
    assert images.any()


def test_a_forward_that_writes_to_its_input_writes_to_a_copy(images):
    class InPlace(Net):
        def forward(self, images):
            return super().forward(images.sub_(0.5).div_(0.25))

    before, targets = images.clone(), torch.tensor([0, 1])
    for method in METHODS:
        method(made(InPlace), images, targets)
    assert torch.equal(images, before)
    for method in (GradCAM(), GuidedBackprop()):
        expected = method(made(Net), (images - 0.5) / 0.25, targets)
        torch.testing.assert_close(method(made(InPlace), images, targets), expected)


@method_cases
def test_pictures_that_come_out_of_inference_mode(method, images):
    expected = maps_of(made(Net), images, method)
    with torch.inference_mode():
        same(maps_of(made(Net), images * 1, method), expected)


@pytest.mark.parametrize("place", ["attribute", "buffer", "cache"])
@method_cases
def test_constants_that_were_cached_in_inference_mode(method, place, images):
    class Caching(Net):
        def __init__(self):
            super().__init__()
            self.gain, self.cache = None, {}
            self.register_buffer("buffer", None)

        def forward(self, images):
            if not self.cache and self.gain is None and self.buffer is None:
                ones = torch.ones(16, 1, 1)
                if place == "cache":
                    self.cache["gain"] = ones
                else:
                    setattr(self, "gain" if place == "attribute" else "buffer", ones)
            gain = next(g for g in (self.cache.get("gain"), self.gain, self.buffer) if g is not None)
            return self.classify(self.features(images) * gain)

    model = made(Caching)
    expected = maps_of(copy.deepcopy(model), images, method)
    with torch.inference_mode():
        model(images)
    before = state(model)
    same(maps_of(model, images, method), expected)
    assert state(model) == before


@method_cases
def test_a_model_that_was_built_in_inference_mode(method, images):
    expected = maps_of(made(Net), images, method)
    with torch.inference_mode():
        model = made(Net)
    parameters = list(model.parameters())
    same(maps_of(model, images, method), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("how", ["wrapper", "in place", "child"])
def test_compiled_models_are_looked_into_eagerly(how, images, expected):
    model = made(Net)
    compiled = model
    if how == "wrapper":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        model.features = torch.compile(model.features, backend="aot_eager")
    with torch.no_grad():
        compiled(images)  # From here on, a hook that is added would not be seen by what was compiled.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    same(maps_of(compiled, images), expected)
    same(maps_of(compiled, images, GradCAM()), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not model.training
    assert compiled.training is False


@method_cases
def test_a_bfloat16_model(method, images):
    got = maps_of(made(Net).bfloat16(), images.bfloat16(), method)
    assert got.maps.dtype == got.scores.dtype == torch.float32
    expected = maps_of(made(Net), images, method)
    assert (got.maps - expected.maps).abs().mean() < 0.02
    torch.testing.assert_close(got.scores, expected.scores, atol=0.01, rtol=0)


@method_cases
def test_the_default_dtype_which_half_precision_trainers_set_changes_nothing(method, images):
    model, images = made(Net).bfloat16(), images.bfloat16()
    expected = maps_of(model, images, method)
    torch.set_default_dtype(torch.bfloat16)
    try:
        same(maps_of(model, images, method), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@method_cases
def test_autocast_around_the_call(method, images):
    model = made(Net)
    plain_maps = maps_of(model, images, method)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images).float().softmax(1)[[0, 1], [0, 1]]
        got = maps_of(model, images, method)
    assert got.maps.dtype == torch.float32
    assert not torch.equal(half, plain_maps.scores)
    torch.testing.assert_close(got.scores, half, atol=1e-6, rtol=0)
    assert (got.maps - plain_maps.maps).abs().mean() < 0.02


def test_training_inside_the_same_autocast_keeps_its_gradients(images):
    def gradients(explains):
        model = made(Net)
        with torch.autocast("cpu", torch.bfloat16):
            if explains:
                maps_of(model, images)
            model(images).float().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


@method_cases
def test_channels_last(method, images):
    model = made(Net).to(memory_format=torch.channels_last)
    got = maps_of(model, images.contiguous(memory_format=torch.channels_last), method)
    same(got, maps_of(made(Net), images, method), 1e-5)


class Reading(Net):
    """Reads its features as a sequence."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.reader = nn.LSTM(16, 16, 2, dropout=dropout, batch_first=True)

    def forward(self, images):
        features = self.features(images)
        return self.head(self.reader(features.flatten(2).mT)[0][:, -1])


class Recurrent(nn.LSTM):
    """A subclass that only makes itself in its own way."""

    def __init__(self, dropout):
        super().__init__(16, 16, 2, dropout=dropout, batch_first=True)


class Scaled(Recurrent):
    """Has a forward of its own around torch's."""

    def forward(self, sequence, state=None):
        output, state = super().forward(sequence, state)
        return (2.0 if self.training else 1.0) * output, state


class Inherited(Reading):
    def __init__(self, dropout=0.0, kind=Recurrent):
        super().__init__()
        self.reader = kind(dropout)


@method_cases
@pytest.mark.parametrize("kind", [Reading, Inherited])
def test_a_recurrent_head_is_explained_in_train_mode_without_dropout(images, method, kind):
    # In eval mode, cuDNN refuses its gradients.
    model = made(lambda: kind(dropout=0.5)).eval()
    expected = maps_of(made(kind).eval(), images, method)
    with explaining(model):
        assert (model.reader.training, model.reader.dropout, model.training) == (True, 0, False)
        assert torch.backends.cudnn.enabled
    same(maps_of(model, images, method), expected)
    assert (model.reader.training, model.reader.dropout) == (False, 0.5)


@method_cases
def test_a_recurrent_module_with_a_forward_of_its_own_stays_in_eval_mode_and_does_without_cudnn(
    images, method
):
    model = made(lambda: Inherited(0.5, Scaled)).eval()
    expected = maps_of(made(Inherited).eval(), images, method)
    with explaining(model):
        assert (model.reader.training, model.reader.dropout) == (False, 0.5)
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled
    same(maps_of(model, images, method), expected)
