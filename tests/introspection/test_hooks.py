import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sess_lightning.introspection.hooks import recording
from sess_lightning.introspection.logits import score
from sess_lightning.methods import RISE, SESS, CentreGaussian, GradCAM, GroupCAM, GuidedBackprop
from small_nets import Answer, Named, Net, made, maps_of, method_cases, same


def test_recording_leaves_no_hook_even_after_an_error():
    model = made(Net)
    with pytest.raises(KeyError), recording(model.features):
        raise KeyError
    assert not model.features._forward_hooks


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
    with pytest.raises(ValueError, match="No layer with spatial features reaches the logits"):
        maps_of(made(Inferring), images, GradCAM())


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
    with pytest.raises(ValueError, match=r"the module is traced, exported or scripted.*Explain the module"):
        maps_of(scripted, images, GradCAM())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_parts_do_not_hide_the_layers_of_others(images):
    net = made(Net)
    first, head = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval(), nn.Sequential(nn.ReLU(), nn.Dropout())
    whole = nn.Sequential(first, net, head).eval()
    parts = nn.Sequential(torch.jit.script(first), net, torch.jit.script(head)).eval()
    for method in (GradCAM(), SESS(GradCAM(), num_scales=2)):
        same(maps_of(parts, images, method), maps_of(whole, images, method))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_traced_model_says_that_the_layer_did_not_run(images):
    traced = torch.jit.trace(made(Net), images)
    with pytest.raises(RuntimeError, match=r"did not run.*traced|hook"):
        maps_of(traced, images)
    with pytest.raises(ValueError, match=r"the module is traced, exported.*Explain the module that it was"):
        maps_of(traced, images, GradCAM())
    assert maps_of(traced, images, RISE(num_masks=4)).maps.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "hide",
    [
        lambda net, _: torch.jit.script(net),
        lambda net, images: torch.jit.trace(net, images),
        lambda net, images: torch.export.export(net, (images,)).module(),
        lambda net, _: nn.Sequential(torch.jit.script(net.features), nn.Flatten(), nn.LazyLinear(5)),
    ],
    ids=["scripted", "traced", "exported", "a part scripted"],
)
def test_relus_that_cannot_be_guided_are_refused(hide, images):
    with pytest.raises(RuntimeError, match=r"its ReLUs cannot be guided; explain the module .* Gradient\(\)"):
        maps_of(hide(made(Net), images), images, GuidedBackprop())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_part_without_relus_is_no_obstacle(images):
    net = made(Net)
    same(
        maps_of(nn.Sequential(torch.jit.script(nn.BatchNorm2d(3).eval()), net), images, GuidedBackprop()),
        maps_of(nn.Sequential(nn.BatchNorm2d(3).eval(), net), images, GuidedBackprop()),
    )


@pytest.mark.parametrize("method", [GradCAM(), SESS(GradCAM(), num_scales=2)], ids=str)
def test_what_is_no_module_is_refused(images, unchecked, method):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function; wrap it in one"):
        maps_of(lambda images: made(Net)(images), images, method)
