import contextlib
import copy
import gc
import weakref
from collections import namedtuple
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric

from formula import fill, picture
from sess_lightning.introspection.hooks import recording
from sess_lightning.introspection.layers import find_grid, find_target_layer, input_window, resolve_layer
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, log_scores, logits_of, score, target_logits
from sess_lightning.methods import SESS, CentreGaussian, GradCAM, GroupCAM, GuidedBackprop

METHODS = [
    GradCAM("features.2"),
    GuidedBackprop(),
    GroupCAM(4, "features.2"),
    SESS(GradCAM("features.2"), num_scales=2, batch_size=4),
    SESS(GuidedBackprop(), num_scales=2, prefilter_ratio=0.5, batch_size=4),
]
method_cases = pytest.mark.parametrize(
    "method", METHODS, ids=["cam", "guided", "group", "sess-cam", "sess-guided"]
)


class Net(nn.Module):
    """32 px -> 8 x 8 features of 16 channels -> 5 classes."""

    def __init__(self, classes=5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(16, classes)

    def forward(self, images):
        return self.classify(self.features(images))

    def classify(self, features):
        return self.head(features.mean((2, 3)))


@pytest.fixture
def images():
    return torch.stack([picture(32, 32, 1), picture(32, 32, 2)])


def made(net, *args):
    """``net`` with the formula's weights: equal for equal shapes."""
    return fill(net(*args), head_gain=1.0)


LOGITS = torch.tensor([[1.0, 2.0, 4.0]])
Named = namedtuple("Named", ["logits", "features"])


class Answer(dict):
    """As Hugging Face answers: a dict whose items are attributes, too."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, "aux"),
        [LOGITS, "aux"],
        {"loss": torch.tensor(0.0), "logits": LOGITS},
        Answer(loss=torch.tensor(0.0), logits=LOGITS),
        SimpleNamespace(logits=LOGITS),
        Named(LOGITS, None),
    ],
    ids=["tensor", "tuple", "list", "dict", "huggingface", "attribute", "namedtuple"],
)
def test_logits_are_found_in(output):
    assert logits_of(output) is LOGITS


def test_logits_without_a_class_axis_are_those_of_a_single_logit_head():
    assert logits_of(torch.tensor([1.0, 2.0])).tolist() == [[1.0], [2.0]]


def test_an_output_without_logits_is_refused_by_its_kind():
    with pytest.raises(TypeError, match=r"returned dict; expected logits \(B, N\).*Wrap the model"):
        logits_of({"boxes": LOGITS})
    with pytest.raises(TypeError, match="returned NoneType"):
        logits_of(None)
    with pytest.raises(
        ValueError, match=r"logits have shape \(2, 5, 7, 7\).*wrap the model so that it pools"
    ):
        logits_of(torch.zeros(2, 5, 7, 7))


def test_target_logits_are_gathered_whatever_the_integer_type():
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for dtype in (torch.int64, torch.int32, torch.int8):
        assert target_logits(logits, torch.tensor([1, 0], dtype=dtype)).tolist() == [2.0, 3.0]


def test_a_single_logit_speaks_for_class_1_and_negated_for_class_0():
    assert target_logits(torch.tensor([[3.0], [3.0]]), torch.tensor([1, 0])).tolist() == [3.0, -3.0]


@pytest.mark.parametrize(("classes", "target"), [(2, 2), (2, -1), (1, 2), (1000, 1000)])
def test_targets_the_model_does_not_have_are_refused_by_name(classes, target):
    top = max(2, classes) - 1
    with pytest.raises(
        ValueError, match=rf"targets must be class indices in 0\.\.{top}.*got \[0, {target}\]"
    ):
        target_logits(torch.zeros(2, classes), torch.tensor([0, target]))


def test_log_scores_are_float32_softmax_or_sigmoid():
    half = LOGITS.to(torch.bfloat16)
    softmax, sigmoid = (log_scores(half, torch.tensor([1]), which) for which in ("softmax", "sigmoid"))
    assert softmax.dtype == sigmoid.dtype == torch.float32
    torch.testing.assert_close(softmax.exp(), LOGITS.softmax(1)[:, 1])
    torch.testing.assert_close(sigmoid.exp(), LOGITS.sigmoid()[:, 1])


def test_log_scores_of_a_single_logit_head_are_a_sigmoids_whatever_the_activation():
    logit = torch.tensor([[3.0], [3.0]])
    expected = torch.tensor([3.0, -3.0]).sigmoid()
    for activation in ("softmax", "sigmoid"):
        torch.testing.assert_close(log_scores(logit, torch.tensor([1, 0]), activation).exp(), expected)


def test_log_scores_keep_what_float32_probabilities_lose():
    logits = torch.tensor([[1000.0, -1000.0]])
    assert log_scores(logits, torch.tensor([1])).tolist() == [-2000.0]
    assert log_scores(logits, torch.tensor([1]), "sigmoid").tolist() == [-1000.0]


def test_score_is_one_plain_forward(images):
    model = made(Net)
    expected = model(images).log_softmax(1)[[0, 1], [4, 2]]
    got = score(model, images, torch.tensor([4, 2]))
    assert torch.equal(got, expected)
    assert not got.requires_grad


ONE, TWO = torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)
ZERO = torch.zeros(1).long()


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        (ONE[0], ZERO, ValueError, r"images must be \(B, C, H, W\), got \(3, 8, 8\); use images\[None\]"),
        (ONE[:0], ZERO[:0], ValueError, r"images is empty, \(0, 3, 8, 8\); give at least one image"),
        (ONE[:, :, :0], ZERO, ValueError, r"images is empty, \(1, 3, 0, 8\)"),
        (ONE.byte(), ZERO, TypeError, r"images must be a floating.*got torch.uint8; convert and normalise"),
        ([[0.0]], ZERO, TypeError, r"images must be a floating point tensor.*got list"),
        (TWO, ZERO, ValueError, r"targets must have shape \(2,\).*got \(1,\)"),
        (TWO, torch.zeros(2, 5).long(), ValueError, r"targets must have shape \(2,\).*got \(2, 5\)"),
        (ONE, ZERO[0], ValueError, r"targets must have shape \(1,\).*got \(\)"),
        (
            ONE,
            ZERO.float(),
            TypeError,
            r"targets must be an integer tensor.*got torch.float32; use targets.long",
        ),
        (ONE, ZERO.bool(), TypeError, r"targets must be an integer tensor.*got torch.bool"),
        (ONE, [0], TypeError, r"targets must be an integer tensor.*got list"),
        (ONE, ZERO.to("meta"), ValueError, r"targets are on meta, images on cpu; move them together"),
        (ONE * torch.nan, ZERO, ValueError, r"images hold NaN or infinite values; clean the pictures"),
        (ONE - torch.inf, ZERO, ValueError, r"images hold NaN or infinite values"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_with_the_argument_and_the_remedy(images, targets, error, message):
    with pytest.raises(error, match=f"Speaker: {message}"):
        check_inputs("Speaker", images, targets)
    for method in METHODS:
        with pytest.raises(error, match=f"{type(method).__name__}: {message}"):
            method(made(Net), images, targets)


@method_cases
def test_targets_out_of_range_are_refused_by_every_method(method, images):
    with pytest.raises(
        ValueError, match=r"targets must be class indices in 0\.\.4, as the model has, got \["
    ):
        method(made(Net), images, torch.tensor([0, 5]))


@method_cases
def test_images_with_other_channels_are_refused_by_every_method(method, images):
    with pytest.raises(
        ValueError, match=r"images have 1 channels, which the model does not take.*to have 3 channels"
    ):
        method(made(Net), images[:, :1], torch.tensor([0, 1]))


def test_an_error_of_the_model_itself_comes_through_as_it_is(images):
    model = made(Net)
    model.head = nn.Linear(17, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        GradCAM("features")(model, images, torch.tensor([0, 1]))


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
        "matmul": torch.get_float32_matmul_precision(),
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


def test_parameters_that_the_forward_swaps_are_left_to_it(images):
    class Unsharding(Net):
        def forward(self, images):
            self.head._parameters["weight"] = self.whole
            return super().forward(images)

    model = made(Unsharding)
    vars(model)["whole"] = nn.Parameter(model.head.weight.detach() * 2)
    GradCAM("features")(model, images, torch.tensor([0, 1]))
    assert model.head.weight is model.whole


def test_a_metric_that_is_a_part_of_the_model_keeps_what_it_is_told_inside():
    model = made(Net)
    model.metric = CatMetric()
    with explaining(model):
        model.metric.update(torch.tensor([3.0, 4.0]))
    assert model.metric.compute().tolist() == [3, 4]


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


def test_recording_leaves_no_hook_even_after_an_error():
    model = made(Net)
    with pytest.raises(KeyError), recording(model.features):
        raise KeyError
    assert not model.features._forward_hooks


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


def maps_of(model, images, method=None):
    return (method or GradCAM("features")).explain(model, images, torch.tensor([0, 1]))


@pytest.fixture
def expected(images):
    explained = maps_of(made(Net), images)
    assert explained.maps.amax((1, 2)).tolist() == [1.0, 1.0]
    return explained


def same(got, expected, tolerance=0.0):
    torch.testing.assert_close(got.maps, expected.maps, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.scores, expected.scores, atol=tolerance, rtol=0)


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


@method_cases
def test_frozen_parameters(method, images):
    same(maps_of(made(Net).requires_grad_(False), images, method), maps_of(made(Net), images, method))


class FrozenBackbone(Net):
    """As Lightning's manual writes transfer learning."""

    def forward(self, images):
        with torch.no_grad():
            features = self.features(images)
        return self.classify(features)


@pytest.mark.parametrize("layer", ["features", "features.1", None])
def test_a_backbone_inside_its_own_no_grad(layer, images):
    model = made(FrozenBackbone)
    expected = maps_of(made(Net), images, GradCAM(layer or "features"))
    same(maps_of(model, images, GradCAM(layer)), expected)
    same(maps_of(model.requires_grad_(False), images, GradCAM(layer)), expected)


def test_a_backbone_inside_its_own_no_grad_is_refused_where_the_pixels_gradient_is_asked(images):
    with pytest.raises(RuntimeError, match="runs it under no_grad"):
        maps_of(made(FrozenBackbone), images, GuidedBackprop())


def test_a_backbone_inside_its_own_inference_mode_is_refused(images):
    class Inferring(Net):
        def forward(self, images):
            with torch.inference_mode():
                features = self.features(images)
            return self.classify(features.clone())

    with pytest.raises(RuntimeError, match=r"target layer in its own inference_mode.*use no_grad there"):
        maps_of(made(Inferring), images)


def test_features_that_are_detached_are_refused(images):
    class Detaching(Net):
        def classify(self, features):
            return super().classify(features.detach())

    for model in (made(Detaching), made(Detaching).requires_grad_(False)):
        for method in (GradCAM("features"), GroupCAM(4, "features"), GuidedBackprop()):
            with pytest.raises(RuntimeError, match=r"No gradient flows from the model's logits back.*detach"):
                maps_of(model, images, method)


@method_cases
def test_an_in_place_relu_after_the_layer(method, images):
    class InPlace(Net):
        def __init__(self):
            super().__init__()
            self.features[1], self.features[3] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    same(maps_of(made(InPlace), images, method), maps_of(made(Net), images, method))


def test_a_shared_layer_is_read_at_its_last_call(images):
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.features[1] = self.features[3] = nn.ReLU()

    expected = maps_of(made(Net), images, GradCAM("features.3"))
    for name in ("features.1", "features.3"):
        same(maps_of(made(Shared), images, GradCAM(name)), expected)


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


OUTPUTS = {
    "tuple": lambda logits: (logits, None),
    "dict": lambda logits: {"logits": logits},
    "attribute": lambda logits: SimpleNamespace(logits=logits),
    "huggingface": lambda logits: Answer(logits=logits),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
@method_cases
def test_a_model_that_wraps_its_logits(method, wrap, images):
    class Wrapping(Net):
        def forward(self, images):
            return wrap(super().forward(images))

    same(maps_of(made(Wrapping), images, method), maps_of(made(Net), images, method))


LAYER_OUTPUTS = {
    "tuple": (lambda f: (f, 1), lambda o: o[0]),
    "list": (lambda f: [None, f], lambda o: o[1]),
    "namedtuple": (lambda f: Named("nothing", f), lambda o: o.features),
    "dict": (lambda f: {"size": 8, "features": f}, lambda o: o["features"]),
    "huggingface": (lambda f: Answer(features=f), lambda o: o.features),
}


@pytest.mark.parametrize(("wrap", "unwrap"), LAYER_OUTPUTS.values(), ids=LAYER_OUTPUTS)
def test_a_layer_that_wraps_its_features(wrap, unwrap, images, expected):
    class Wrapping(nn.Module):
        def forward(self, features):
            return wrap(features)

    class Wrapped(Net):
        def __init__(self):
            super().__init__()
            self.wrapping = Wrapping()

        def classify(self, features):
            return super().classify(unwrap(self.wrapping(features)))

    for layer in ("wrapping", None):
        same(maps_of(made(Wrapped), images, GradCAM(layer)), expected)


def test_a_layer_without_a_tensor_is_refused(images):
    class Silent(nn.Module):
        def forward(self, features):
            return "nothing"

    class Talking(Net):
        def __init__(self):
            super().__init__()
            self.silent = Silent()

        def classify(self, features):
            self.silent(features)
            return super().classify(features)

    with pytest.raises(TypeError, match=r"target_layer must return a tensor.*got str; name another layer"):
        maps_of(made(Talking), images, GradCAM("silent"))
    same(maps_of(made(Talking), images, GradCAM()), maps_of(made(Net), images))


def test_a_single_logit_head_is_a_two_class_head_whose_logits_are_opposite(images):
    one = made(Net, 1)
    two = made(Net, 2)
    two.head.weight.data = torch.cat([-one.head.weight, one.head.weight]).detach()
    two.head.bias.data = torch.cat([-one.head.bias, one.head.bias]).detach()
    for method in (GradCAM("features"), GuidedBackprop()):
        got, expected = maps_of(one, images, method), maps_of(two, images, method)
        torch.testing.assert_close(got.maps, expected.maps)
    logits = one(images)[:, 0]
    torch.testing.assert_close(got.scores, torch.stack([-logits[0], logits[1]]).sigmoid())


@pytest.mark.parametrize(
    "method", [GradCAM, GuidedBackprop, lambda **k: GroupCAM(4, **k), lambda **k: SESS(GradCAM(**k))]
)
def test_multi_label_heads_are_scored_by_a_sigmoid(method, images):
    expected = made(Net)(images).sigmoid()[[0, 1], [0, 1]]
    torch.testing.assert_close(maps_of(made(Net), images, method(activation="sigmoid")).scores, expected)


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


class Checkpointed(Net):
    reentrant = False

    def forward(self, images):
        features = checkpoint(self.features, images, use_reentrant=self.reentrant)
        return checkpoint(self.classify, features, use_reentrant=self.reentrant)


@pytest.mark.parametrize("layer", ["features", "features.1"])
def test_activation_checkpointing(layer, images):
    same(maps_of(made(Checkpointed), images, GradCAM(layer)), maps_of(made(Net), images, GradCAM(layer)))
    same(maps_of(made(Checkpointed), images, GradCAM()), maps_of(made(Net), images))


def test_guided_backprop_refuses_activations_that_the_backward_computes_anew(images):
    with pytest.raises(
        RuntimeError, match=r"GuidedBackprop: the model checkpoints.*switch checkpointing off"
    ):
        maps_of(made(Checkpointed), images, GuidedBackprop())


@pytest.mark.parametrize("method", [GradCAM("features"), GradCAM(), GuidedBackprop()], ids=repr)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_with_the_remedy(method, images):
    model = made(Checkpointed)
    model.reentrant = True
    with pytest.raises(RuntimeError, match="under a checkpoint with use_reentrant=True"):
        maps_of(model, images, method)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_can_be_scored_and_says_why_it_cannot_be_looked_into(images):
    scripted = torch.jit.script(made(Net)).train()
    assert torch.equal(
        score(scripted, images, torch.tensor([0, 1])), score(made(Net), images, torch.tensor([0, 1]))
    )
    same(maps_of(scripted, images, CentreGaussian()), maps_of(made(Net), images, CentreGaussian()))
    assert scripted.training
    with pytest.raises(RuntimeError, match="hook"):
        maps_of(scripted, images)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_traced_model_says_that_the_layer_did_not_run(images):
    traced = torch.jit.trace(made(Net), images)
    with pytest.raises(RuntimeError, match=r"did not run.*traced|hook"):
        maps_of(traced, images)


def test_a_layer_is_named_or_given(images):
    model = made(Net)
    assert resolve_layer(model, "features.2", images) is model.features[2]
    assert resolve_layer(model, model.features[2], images) is model.features[2]
    assert resolve_layer(model, None, images) is model.features


def test_a_layer_may_be_named_by_any_of_its_names(images):
    model = made(Net)
    model.alias = model.features[2]
    assert resolve_layer(model, "alias", images) is model.features[2]


def test_torch_compiles_wrapper_may_be_left_out_of_a_name(images):
    compiled = torch.compile(made(Net))
    assert resolve_layer(compiled, "features.2", images) is compiled._orig_mod.features[2]
    assert resolve_layer(compiled, "_orig_mod.features.2", images) is compiled._orig_mod.features[2]


@pytest.mark.parametrize("name", ["layer4", "features.9", ""])
def test_an_unknown_layer_is_refused_with_names_that_exist(name, images):
    with pytest.raises(
        ValueError, match=f"target_layer '{name}' is unknown; this model has.*features.3, head; leave it out"
    ):
        maps_of(made(Net), images, GradCAM(name))


def test_another_models_layer_is_refused(images):
    with pytest.raises(ValueError, match="target_layer Sequential is not a part of this model"):
        maps_of(made(Net), images, GradCAM(made(Net).features))


def test_a_layer_that_never_runs_is_refused(images):
    model = made(Net)
    model.unused = nn.Conv2d(3, 3, 3)
    with pytest.raises(RuntimeError, match="target_layer Conv2d did not run in the model's forward"):
        maps_of(model, images, GradCAM("unused"))


def test_a_layer_without_a_grid_is_refused(images):
    with pytest.raises(
        ValueError, match=r"target_layer Linear gives features of shape \(2, 5\), which lie on no grid over"
    ):
        maps_of(made(Net), images, GradCAM("head"))


def test_a_layer_that_folds_places_into_the_batch_is_refused(images):
    class Windowed(Net):
        def __init__(self):
            super().__init__()
            self.per_window = nn.ReLU()

        def classify(self, features):
            parts = F.unfold(features, 4, stride=4).permute(0, 2, 1).reshape(-1, 16, 4, 4)
            return super().classify(self.per_window(parts)).unflatten(0, (len(features), -1)).mean(1)

    with pytest.raises(
        ValueError, match=r"features of shape \(8, 16, 4, 4\), which lie on no grid over \(2, 3, 32, 32\)"
    ):
        maps_of(made(Windowed), images, GradCAM("per_window"))
    assert find_target_layer(made(Windowed), images).__class__ is nn.Sequential


def forwards_of(model, call):
    count = []
    with contextlib.closing(
        SimpleNamespace(close=model.register_forward_hook(lambda *_: count.append(1)).remove)
    ):
        call()
    return len(count)


def test_the_search_costs_one_forward_once_per_image_size(images):
    model = made(Net)
    assert forwards_of(model, lambda: find_target_layer(model, images)) == 1
    assert forwards_of(model, lambda: find_target_layer(model, images)) == 0
    assert forwards_of(model, lambda: find_target_layer(model, images[..., :24])) == 1


def test_what_is_remembered_of_a_model_does_not_keep_it_alive(images):
    model = made(Net)
    find_target_layer(model, images)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


class Pyramid(Net):
    """Each layer halves the picture."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(6)), nn.Flatten()
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        features = images
        for layer in self.features[:-1]:
            features = layer(features)
        return self.classify(features)


def test_the_search_answers_anew_for_another_image_size():
    model = made(Pyramid)
    assert find_target_layer(model, torch.ones(1, 3, 32, 32)) is model.features[3]
    assert find_target_layer(model, torch.ones(1, 3, 128, 128)) is model.features[5]
    assert find_target_layer(model, torch.ones(1, 3, 32, 32)) is model.features[3]


def test_the_search_says_what_it_saw_where_no_layer_keeps_a_grid(images):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 32 * 32, 5)

        def forward(self, images):
            return self.head(images.flatten(1))

    with pytest.raises(
        ValueError, match=r"No layer with spatial features.*32x32 image.*head \(1, 5\).*Name target_layer"
    ):
        find_target_layer(Flat(), images)


def test_the_search_passes_over_class_maps_but_not_over_as_many_features_as_classes(images):
    class Convolutional(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(16, 5, 1)

        def classify(self, features):
            return self.head(features).mean((2, 3))

    model = made(Convolutional)
    assert find_target_layer(model, images) is model.features
    model = made(Net, 16)
    assert find_target_layer(model, images) is model.features


def test_the_search_takes_a_class_map_where_there_is_nothing_else(images):
    model = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_target_layer(model, images) is model[0]
    model = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find_target_layer(model, images) is model[1]


def test_the_search_looks_in_front_of_a_head_of_zeros(images):
    class ZeroHead(Net):
        def classify(self, features):
            return self.head(self.norm(features.mean((2, 3))))

    model = made(ZeroHead)
    model.norm = nn.LayerNorm(16)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert find_target_layer(model, images) is model.features


class ClassToken(nn.Module):
    """A transformer of two blocks that reads its answer from a class token, with ``registers`` beside it."""

    def __init__(self, registers=0):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.extra = nn.Parameter(torch.zeros(1, 1 + registers, 16))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        )
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.extra.expand(len(tokens), -1, -1), tokens], 1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


@pytest.mark.parametrize("registers", [0, 4])
def test_the_search_finds_the_last_layer_whose_patches_still_reach_the_class_token(registers, images):
    torch.manual_seed(0)
    model = ClassToken(registers)
    assert find_target_layer(model, images) is model.blocks[0]
    maps = GradCAM()(model, images, torch.tensor([0, 1]))
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 512, 7, 7), (224, 224), ("channels", 7, 7, 512, 0)),
        ((1, 7, 7, 768), (224, 224), ("channels_last", 7, 7, 768, 0)),
        ((1, 197, 768), (224, 224), ("tokens", 14, 14, 768, 1)),
        ((1, 198, 192), (224, 224), ("tokens", 14, 14, 192, 2)),
        ((1, 201, 384), (224, 224), ("tokens", 14, 14, 384, 5)),
        ((1, 196, 384), (224, 224), ("tokens", 14, 14, 384, 0)),
        ((1, 50, 768), (224, 224), ("tokens", 7, 7, 768, 1)),
        ((1, 257, 1024), (224, 224), ("tokens", 16, 16, 1024, 1)),
        ((1, 393, 768), (224, 448), ("tokens", 14, 28, 768, 1)),
        ((1, 392, 768), (448, 224), ("tokens", 28, 14, 768, 0)),
        ((1, 7, 14, 768), (224, 448), ("channels_last", 7, 14, 768, 0)),
        ((1, 512, 5, 8), (150, 225), ("channels", 5, 8, 512, 0)),
        ((1, 24, 7, 7), (32, 32), ("channels", 7, 7, 24, 0)),
        ((1, 7, 7, 24), (32, 32), ("channels_last", 7, 7, 24, 0)),
        ((1, 64, 32, 32), (32, 32), ("channels", 32, 32, 64, 0)),
        ((1, 512, 1, 2), (32, 64), ("channels", 1, 2, 512, 0)),
    ],
)
def test_a_shape_is_read_as_a_grid(shape, size, expected):
    grid = find_grid(torch.Size(shape), size)
    assert (grid.layout, grid.height, grid.width, grid.channels, grid.extra) == expected
    features = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    maps = grid.to_maps(features)
    assert maps.shape == (1, grid.channels, grid.height, grid.width)
    places = features.flatten(2).mT if grid.layout == "channels" else features.flatten(1, -2)
    assert torch.equal(maps.flatten(2).mT, places[:, grid.extra :])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 512, 1, 1),
        (1, 1000),
        (1,),
        (1, 12, 197, 64),
        (1, 512, 300, 300),
        (1, 1, 512),
        (1, 2, 3, 4, 5),
        (1, 1, 49, 512),
    ],
)
def test_a_shape_that_lies_on_no_grid(shape):
    assert find_grid(shape, (224, 224)) is None


def stating(**attributes):
    model = nn.Module()
    vars(model).update(attributes)
    return model


@pytest.mark.parametrize(
    ("attributes", "window"),
    [
        ({"config": SimpleNamespace(image_size=384)}, 384),
        ({"config": SimpleNamespace(image_size=[224, 224])}, 224),
        ({"pretrained_cfg": {"fixed_input_size": True, "input_size": (3, 256, 256)}}, 256),
        ({"pretrained_cfg": {"fixed_input_size": False, "input_size": (3, 256, 256)}}, None),
        ({"encoder": nn.Identity(), "image_size": 112}, 112),
        ({"image_size": 112}, None),
        ({"config": {"image_size": 7}}, None),
        ({}, None),
    ],
)
def test_the_size_a_model_was_built_for_is_read_where_it_says_so(attributes, window):
    assert input_window(stating(**attributes)) == window
    wrapper = nn.Module()
    wrapper.model = stating(**attributes)
    assert input_window(wrapper) == window
