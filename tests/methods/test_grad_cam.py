import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torchvision.models import get_model

from formula import TARGET_LAYERS, build, picture
from sess_lightning.introspection.hooks import head_forward
from sess_lightning.introspection.layers import find_grid, find_target_layer
from sess_lightning.methods import SESS, GradCAM

LAYERS = {
    "resnet18": "layer4",
    "vgg11": "features.18",  # A convolution; an in-place ReLU follows.
    "densenet121": "features",
    "mobilenet_v3_small": "features",
    "efficientnet_b0": "features.8.0",  # A convolution; batch norm and an in-place SiLU follow.
    "convnext_tiny": "features",
    "swin_t": "features",
    "vit_b_16": "encoder.layers.encoder_layer_11.ln_1",
}


def made(name):
    """A torchvision model for 64 px and 7 classes, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_model(name, num_classes=7, **({"image_size": 64} if name == "vit_b_16" else {}))
        if name == "vit_b_16":
            torch.nn.init.normal_(model.heads.head.weight)  # Zeros, else.
    return model.eval()


def whole_graph(model, layer, images, targets):
    """Grad-CAM as its paper writes it: one graph from the pixels to the logits."""
    held = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda *call: held.append(call[2]) or call[2].clone()
    )
    logits = model(images)
    handle.remove()
    features = held[-1]
    (gradients,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), features)
    to_maps = find_grid(features.shape, tuple(images.shape[-2:])).to_maps
    features, gradients = to_maps(features.detach()), to_maps(gradients)
    maps = F.relu((gradients.mean((2, 3), keepdim=True) * features).sum(1))
    maps = F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low), logits


@pytest.mark.parametrize(("name", "layer"), LAYERS.items())
def test_one_forward_tells_what_the_whole_graph_tells(name, layer):
    model, images = made(name), torch.stack([picture(64, 64, 1), picture(64, 64, 2)])
    targets = model(images).argmax(1)
    expected, logits = whole_graph(model, layer, images, targets)
    got, scores = GradCAM(layer).explain(model, images, targets)
    assert expected.amax((1, 2)).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(scores, logits.softmax(1).gather(1, targets[:, None])[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_grad_cam_is_the_library_grad_cams(name):
    foreign = pytest.importorskip("pytorch_grad_cam")
    model, images = build(name), torch.stack([picture(224, 224, 1), picture(224, 224, 2)])
    targets = model(images).argmax(1)
    layer = model.get_submodule(TARGET_LAYERS[name])
    wanted = [foreign.utils.model_targets.ClassifierOutputTarget(target) for target in targets.tolist()]
    with foreign.GradCAM(model, [layer]) as oracle:
        expected = torch.from_numpy(oracle(images, wanted))
    model.zero_grad(set_to_none=True)
    assert expected.amax() > 0.99
    torch.testing.assert_close(GradCAM(layer)(model, images, targets), expected, atol=2e-5, rtol=0)


def test_one_forward_per_batch_and_one_more_ever_to_find_the_layer(tiny, images, targets):
    sizes = []
    tiny.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    GradCAM("features.5")(tiny, images, targets)
    assert sizes == [2]
    GradCAM()(tiny, images, targets)
    assert sizes == [2, 1, 2]
    GradCAM()(tiny, images, targets)
    assert sizes == [2, 1, 2, 2]


def leaves_of(tensor):
    """The tensors at which a graph ends."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(next_node for next_node, _ in node.next_functions)
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def test_nothing_before_the_layer_is_recorded():
    model, images = build("resnet18"), picture(64, 64, 1)[None]
    assert all(parameter.requires_grad for parameter in model.parameters())
    recorded = {}
    # Each is asked before the cut at its end is made.
    handles = [
        module.register_forward_hook(lambda *call, name=name: recorded.update({name: call[2].requires_grad}))
        for name, module in model.named_children()
    ]
    with torch.no_grad():
        logits, features = head_forward(model, model.layer4, images)
        assert not torch.is_grad_enabled()
    for handle in handles:
        handle.remove()
    assert recorded == {
        **dict.fromkeys(["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"], False),
        **dict.fromkeys(["avgpool", "fc"], True),
    }
    assert leaves_of(logits) == {id(features), id(model.fc.weight), id(model.fc.bias)}


@pytest.mark.parametrize(
    ("size", "layer"),
    [
        ((224, 224), "layer4"),
        ((64, 64), "layer4"),
        ((32, 32), "layer3"),
        ((40, 130), "layer4"),
        ((96, 33), "layer4"),
    ],
)
def test_a_layer_is_found_for_pictures_of_any_size(size, layer):
    model, images = build("resnet18"), picture(*size, 1)[None]
    assert find_target_layer(model, images) is model.get_submodule(layer)
    for method in (GradCAM(), SESS(GradCAM(), num_scales=2)):
        maps = method(model, images, model(images).argmax(1))
        assert maps.shape == (1, *size)
        assert maps.amax().item() == pytest.approx(1)


def test_a_map_without_positive_evidence_is_all_zeros_not_nan(tiny, images, targets):
    tiny.fc.weight.data = -tiny.fc.weight.data.abs()
    maps = GradCAM("features.5")(tiny, images, targets)
    assert torch.equal(maps, torch.zeros(2, 224, 224))


def test_extract_keeps_to_the_layers_grid_and_explain_draws_it(tiny, images, targets):
    coarse, logs, _ = GradCAM("features.5").extract(tiny, images, targets)
    maps, scores = GradCAM("features.5").explain(tiny, images, targets)
    assert coarse.shape == (2, 7, 7)
    drawn = F.interpolate(coarse[:, None], (224, 224), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, drawn, atol=1e-6, rtol=0)
    assert torch.equal(scores, logs.exp())
