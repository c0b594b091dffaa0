"""Every classification model of torchvision, with random weights and no layer named."""

import gc

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_builder, list_models

from formula import picture
from sess_lightning.introspection.layers import find_target_layer
from sess_lightning.methods import SESS, GradCAM

MODELS = list_models(module=torchvision.models)
# The smallest of each architecture, and the layer that must be found.
SMALLEST = {
    "alexnet": "features.11",
    "convnext_tiny": "features",
    "densenet121": "features",
    "efficientnet_b0": "features",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "maxvit_t": "blocks.3",
    "mnasnet0_5": "layers",
    "mobilenet_v2": "features",
    "mobilenet_v3_small": "features",
    "regnet_x_400mf": "trunk_output",
    "resnet18": "layer4",
    "shufflenet_v2_x0_5": "conv5",
    "squeezenet1_1": "features",
    "swin_t": "permute",
    "vgg11": "features.19",
    "vit_b_32": "encoder.layers.encoder_layer_11.ln_1",
}


def side_of(name):
    """The smallest pictures whose last features still lie on a grid worth the name: 3 x 3."""
    return {"inception_v3": 160, "maxvit_t": 224, "vit_h_14": 70}.get(name, 96)


def made(name):
    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit"):
        settings = {"image_size": side_of(name)}
    with torch.random.fork_rng():
        # Where all evidence is negative by chance a map is rightly flat: other weights, then.
        torch.manual_seed(2 if name in ("googlenet", "inception_v3") else 0)
        model = get_model(name, num_classes=10, **settings)
        if name.startswith("vit"):
            torch.nn.init.normal_(model.heads.head.weight)  # Zeros, else.
    return model.eval()


@pytest.mark.parametrize(
    "name", [name if name in SMALLEST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_maps_are_finite_and_not_flat_with_no_layer_named(name):
    model, images = made(name), picture(side_of(name), side_of(name), 1)[None]
    with torch.no_grad():
        targets = model(images).argmax(1)
    if name in SMALLEST:
        assert find_target_layer(model, images) is model.get_submodule(SMALLEST[name])
    for method in (GradCAM(), SESS(GradCAM(), num_scales=2)):
        maps = method(model, images, targets)
        assert maps.isfinite().all()
        assert maps.amin().item() == pytest.approx(0, abs=1e-6)
        assert maps.amax().item() == pytest.approx(1, abs=1e-6)
    gc.collect()


def test_every_architecture_has_its_smallest_model_in_the_quick_run():
    def architectures(names):
        return {get_model_builder(name).__module__ for name in names}

    assert len(MODELS) >= 80
    assert architectures(SMALLEST) == architectures(MODELS)
    assert len(architectures(SMALLEST)) == len(SMALLEST)
