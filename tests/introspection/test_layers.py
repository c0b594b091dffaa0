import contextlib
import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models import VisionTransformer

from sess_lightning.introspection.layers import find_target_layer, resolve_layer
from sess_lightning.methods import GradCAM
from small_nets import Net, made, maps_of


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


@pytest.mark.parametrize("layer", [3, ["features"], ("features", "head"), True])
def test_a_layer_is_named_by_a_text_or_is_a_module(layer, images, unchecked):
    with pytest.raises(TypeError, match=f"target_layer must be .* got {type(layer).__name__}; name a single"):
        maps_of(made(Net), images, GradCAM(layer))


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


def test_the_search_finds_the_same_layer_of_a_vit_whose_head_is_zeros_as_of_a_trained_one():
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()  # torchvision makes the head zeros.
    image, trained = torch.rand(1, 3, 32, 32), copy.deepcopy(model)
    nn.init.normal_(trained.heads.head.weight)
    assert resolve_layer(model, None, image) is model.encoder.layers[-1].ln_1
    assert resolve_layer(trained, None, image) is trained.encoder.layers[-1].ln_1
    assert not GradCAM()(model, image, torch.tensor([0])).any()


def test_a_layer_that_was_found_is_looked_for_anew_if_it_does_not_run_any_more(images):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.average, self.is_late = made(Net), made(Net), False

        def forward(self, images):
            return (self.average if self.is_late else self.net)(images)

    model, targets = Averaged().eval(), torch.zeros(len(images), dtype=torch.int64)
    first = GradCAM()(model, images, targets)
    model.is_late = True
    assert torch.equal(GradCAM()(model, images, targets), GradCAM()(model.average, images, targets))
    assert resolve_layer(model, None, images) is model.average.features
    with pytest.raises(RuntimeError, match="did not run in the model's forward"):
        GradCAM("net.features")(model, images, targets)
    model.is_late = False
    assert torch.equal(GradCAM()(model, images, targets), first)


@pytest.mark.parametrize("bias", [0.0, -4.6])
def test_the_search_looks_in_front_of_a_head_of_zeros(images, bias):
    class ZeroHead(Net):
        def classify(self, features):
            return self.head(self.norm(features.mean((2, 3))))

    model = made(ZeroHead)
    model.norm = nn.LayerNorm(16)
    nn.init.zeros_(model.head.weight)
    nn.init.constant_(model.head.bias, bias)
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
