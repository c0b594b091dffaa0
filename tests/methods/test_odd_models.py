"""Classifiers of timm and Hugging Face, unnamed, with random weights."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from formula import Tiny, fill, picture
from sess_lightning.introspection.hooks import recording
from sess_lightning.introspection.layers import find_grid, find_target_layer
from sess_lightning.introspection.sizes import input_window
from sess_lightning.methods import SESS, GradCAM, HiResCAM

TIMM = {
    # name: (arguments, image side, found layer, (rows, columns, extra tokens), window it states)
    "vit_tiny_patch16_224": ({"img_size": 96, "depth": 3}, 96, "blocks.2.norm1", (6, 6, 1), 96),
    "deit_tiny_distilled_patch16_224": ({"img_size": 96, "depth": 3}, 96, "blocks.2.norm1", (6, 6, 2), 96),
    "vit_small_patch14_reg4_dinov2": (
        {"img_size": 98, "depth": 2, "embed_dim": 48}, 98, "blocks.1.norm1", (7, 7, 5), 98
    ),
    "vit_medium_patch16_reg4_gap_256": (
        {"img_size": 96, "depth": 2, "embed_dim": 64, "num_heads": 2}, 96, "blocks", (6, 6, 4), 96
    ),
    "vit_base_patch16_siglip_224": (
        {"img_size": 96, "depth": 2, "embed_dim": 48, "num_heads": 2}, 96, "norm", (6, 6, 0), 96
    ),
    "cait_xxs24_224": (
        {"img_size": 96, "depth": 2, "embed_dim": 48}, 96, "blocks_token_only.1.norm1", (6, 6, 1), 96
    ),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1, 1, 1), "embed_dim": 24}, 224, "norm", (7, 7, 0), 224),
    "mixer_s32_224": ({}, 224, "norm", (7, 7, 0), 224),
    "convnext_atto": ({}, 96, "stages", (3, 3, 0), None),
    "mambaout_femto": ({}, 96, "stages", (3, 3, 0), None),
    "mobilenetv3_small_050": ({}, 96, "blocks.5.0.bn1", (3, 3, 0), None),
    "efficientnet_lite0": ({}, 96, "bn2", (3, 3, 0), None),
    "resnet10t": ({}, 96, "layer4", (3, 3, 0), None),
    "densenet121": ({"block_config": (2, 2, 2, 2)}, 96, "features", (3, 3, 0), None),
}  # fmt: skip


def assert_explained(model, side, layer, grid, window):
    """The layer is the one a reader would name, and its evidence reaches every image, SESS included."""
    images, targets = torch.stack([picture(side, side, i) for i in (1, 2)]), torch.tensor([0, 1])
    found = find_target_layer(model, images)
    assert {name for name, module in model.named_modules() if module is found} == {layer}
    with recording(found) as tap, torch.no_grad():
        model(images)
    rows, columns, extra = grid
    read = find_grid(tap.features.shape, (side, side))
    assert (read.height, read.width, read.extra) == (rows, columns, extra)
    assert input_window(model) == window
    # Not rectified: of random weights, the target may have but negative evidence.
    maps = Unrectified()(model, images, targets)
    torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))
    assert GradCAM()(model, images, targets).isfinite().all()
    wide = picture(side, side + 20, 1)[None]
    plan = {"window": window or side, "scales": (side, side * 5 // 4), "batch_size": 4}
    maps = SESS(Unrectified(), **plan)(model, wide, targets[:1])
    assert maps.shape == (1, side, side + 20)
    torch.testing.assert_close(maps.amax(), torch.tensor(1.0))
    if window:
        assert SESS(GradCAM()).plan(model, (side, side + 20)).window == window


@dataclass(frozen=True)
class Unrectified(HiResCAM):
    def combine(self, features, gradients):
        return (gradients * features).sum(1)


def awake(model):
    """Heads, and some layers, begin as zeros."""
    chance = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.detach().any():
            parameter.data = torch.randn(parameter.shape, generator=chance) * 0.05
    return model.eval()


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    arguments, side, layer, grid, window = TIMM[name]
    torch.manual_seed(0)
    model = awake(timm.create_model(name, num_classes=5, **arguments))
    assert_explained(model, side, layer, grid, window)


VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 64, "patch_size": 8,
}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
WINDOWS = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 2, 4],
    "window_size": 4,
}  # fmt: skip
HUGGING_FACE = {
    # name: (configuration, found layer, (rows, columns, extra tokens), window it states)
    "ViT": (VISION, "vit.layers.2.layernorm_before", (8, 8, 1), 64),
    "DeiT": (VISION, "deit.layers.2.layernorm_before", (8, 8, 2), 64),
    "Dinov2": (VISION, "dinov2", (8, 8, 1), 64),
    "Dinov2WithRegisters": (VISION | {"num_register_tokens": 4}, "dinov2_with_registers", (8, 8, 5), 64),
    "Swin": (WINDOWS, "swin.layernorm", (4, 4, 0), 64),
    "ConvNext": (STAGES | {"image_size": 64}, "convnext.encoder", (2, 2, 0), 64),
    "ResNet": (STAGES | {"embedding_size": 8, "layer_type": "basic"}, "resnet.encoder", (2, 2, 0), None),
    "CLIP": ({"vision_config": VISION}, "vision_model", (8, 8, 1), 64),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    arguments, layer, grid, window = HUGGING_FACE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(num_labels=5, **arguments)
    model = awake(getattr(transformers, f"{name}ForImageClassification")(config))
    # Layers were renamed more than once: by its kind, where the name is not to be found.
    names = dict(model.named_modules())
    if layer not in names:
        pytest.skip(f"this transformers has no {layer}")
    assert_explained(model, 64, layer, grid, window)


class PooledInside(nn.Module):
    """A backbone, as Hugging Face's, that gives its features and what it pooled of them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.features = fill(Tiny()).features
        self.backbone.forward = self.pool
        self.fc = fill(Tiny()).fc

    def pool(self, images):
        features = self.backbone.features(images)
        return {"features": features, "pooled": features.mean((2, 3))}

    def forward(self, images):
        return self.fc(self.backbone(images)["pooled"])


def test_features_that_a_backbone_gives_but_the_head_does_not_read_are_passed_over(tiny, images, targets):
    model = PooledInside()
    assert find_target_layer(model, images) is model.backbone.features
    torch.testing.assert_close(GradCAM()(model, images, targets), GradCAM()(tiny, images, targets))


def test_an_activation_in_place_after_an_identity_is_not_cut_off(images):
    class Block(nn.Module):
        """Norm, (no) dropout and activation in one, as timm's BatchNormAct2d."""

        def __init__(self):
            super().__init__()
            self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

        def forward(self, features):
            return self.act(self.drop(features * 1))

    class Net(Tiny):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, images):
            return self.fc(self.block(self.features[:-1](images)).mean((2, 3)))

    model = fill(Net())
    assert find_target_layer(model, images) is model.block


def test_a_pooled_vector_of_as_many_channels_as_a_grid_has_places_is_no_grid():
    assert find_grid((1, 1024, 1), (224, 224)) is None
    assert find_grid((1, 1024, 2), (224, 224)) is not None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "loss": None},
        lambda logits: (logits, logits.sum()),
        lambda logits: type("Output", (), {"logits": logits})(),
    ],
    ids=["dict", "tuple", "attribute"],
)
def test_answers_are_unpacked_under_sess_too(wrap, tiny, images, targets):
    class Answering(Tiny):
        def forward(self, images):
            return wrap(super().forward(images))

    model, sess = fill(Answering()), SESS(GradCAM(), num_scales=2)
    got, expected = (sess.explain(each, images, targets) for each in (model, tiny))
    assert torch.equal(got.maps, expected.maps)
    assert torch.equal(got.scores, expected.scores)


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_single_logit_explains_both_of_its_classes(squeezed, images):
    class Binary(Tiny):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(24, 1)

        def forward(self, images):
            logits = super().forward(images)
            return logits[:, 0] if squeezed else logits

    model = fill(Binary())
    both = images[:1].repeat(2, 1, 1, 1)
    explanation = SESS(GradCAM(), num_scales=2).explain(model, both, torch.tensor([0, 1]))
    probability = model(both[:1]).sigmoid().squeeze()
    torch.testing.assert_close(explanation.scores, torch.stack([1 - probability, probability]))
    assert (explanation.maps[0] - explanation.maps[1]).abs().max() > 0.1


def test_a_multi_label_head_is_read_with_a_sigmoid(tiny, images, targets):
    explanation = SESS(GradCAM(activation="sigmoid"), num_scales=2).explain(tiny, images, targets)
    torch.testing.assert_close(explanation.scores, tiny(images).sigmoid()[[0, 1], targets])
