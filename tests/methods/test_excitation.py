import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from formula import build, fill
from real_weights import EGYPTIAN_CAT, TABBY, cats, mobilenet
from sess_lightning.methods import ExcitationBackprop
from sess_lightning.methods.excitation import excitation
from sess_lightning.ops import min_max, upsample

TARGETS = torch.tensor([EGYPTIAN_CAT, TABBY])


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def handed(p, x, weight):
    """Equation 3 of the paper: from outputs with probabilities ``p`` to inputs ``x``, in float64."""
    x, positive = np.maximum(x, 0), np.maximum(weight, 0)
    total = positive @ x
    return x * (positive.T @ np.divide(p, total, out=np.zeros_like(total), where=total > 0))


def conv_matrix(weight, stride, padding, height, width):
    """A convolution as one matrix from flattened inputs to flattened outputs."""
    out, channels, side, _ = weight.shape
    rows, columns = ((n + 2 * padding - side) // stride + 1 for n in (height, width))
    matrix = np.zeros((out, rows, columns, channels, height, width))
    for y in range(rows):
        for x in range(columns):
            for v in range(side):
                for u in range(side):
                    at = y * stride + v - padding, x * stride + u - padding
                    if 0 <= at[0] < height and 0 <= at[1] < width:
                        matrix[:, y, x, :, at[0], at[1]] += weight[:, :, v, u]
    return matrix.reshape(out * rows * columns, -1)


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


@pytest.fixture
def unravelled():
    return lambda map_: (map_ - map_.min()) / (map_.max() - map_.min())


def test_two_layers_by_hand():
    # Class 0 takes from features 0 (2 x 1) and 1 (1 x 3), weight -9 lets nothing in; places share by value.
    features = torch.tensor([[[[1.0, 3.0]], [[0.0, 6.0]], [[5.0, 5.0]]]])
    model = Head([[1.0, 1.0, -9.0]])
    winning, logits = ExcitationBackprop("features").winning(model, features, torch.tensor([1]))
    close(logits, torch.tensor([[2.0 + 3.0 - 45.0]]), 1e-6)
    expected = [[[[0.4 / 4, 0.4 * 3 / 4]], [[0.0, 0.6]], [[0.0, 0.0]]]]
    close(winning, torch.tensor(expected), 1e-6)


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        weight = torch.tensor(weight)
        self.features, self.fc = nn.Identity(), nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.fc.weight = nn.Parameter(weight)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def test_a_single_logits_other_class_is_won_by_negative_weights():
    features = torch.tensor([[[[1.0, 3.0]], [[0.0, 6.0]], [[5.0, 5.0]]]])
    winning, _ = ExcitationBackprop("features").winning(Head([[1.0, 1.0, -9.0]]), features, torch.tensor([0]))
    close(winning, torch.tensor([[[[0.0, 0.0]], [[0.0, 0.0]], [[0.5, 0.5]]]]), 1e-6)


def test_a_convolutional_net_against_matrices(tiny, images, targets, unravelled):
    winning, logits = ExcitationBackprop("features.3").winning(tiny, images, targets)
    close(logits, tiny(images).detach(), 0.0)
    weight = array(tiny.features[4].weight)
    matrix = conv_matrix(weight, 2, 1, 14, 14)
    maps = ExcitationBackprop("features.3")(tiny, images, targets)
    with torch.no_grad():
        lower = tiny.features[:4](images)
        upper = tiny.features[4:](lower)
    for i, target in enumerate(targets):
        x, y = array(lower[i]), array(upper[i])
        p = np.zeros(5)
        p[target] = 1
        p = handed(p, y.mean((1, 2)), array(tiny.fc.weight))
        p = y / np.maximum(y.sum((1, 2), keepdims=True), 1e-300) * p[:, None, None]
        expected = handed(p.ravel(), x.ravel(), matrix).reshape(x.shape)
        np.testing.assert_allclose(winning[i], expected, atol=1e-7)
        drawn = array(upsample(torch.from_numpy(expected.sum(0))[None], (224, 224)))[0]
        np.testing.assert_allclose(maps[i], unravelled(drawn), atol=2e-6)


def mobilenet_by_hand(x, y, target, sign=1):
    """From the logit through the mean and the last 1 x 1 convolution, its norm and its ReLU6."""
    head, last = (
        array(mobilenet().classifier[1].weight),
        array(mobilenet().features[18][0].weight)[:, :, 0, 0],
    )
    p = np.zeros(1000)
    p[target] = 1
    p = handed(p, y.mean((1, 2)), sign * head)
    p = y / np.maximum(y.sum((1, 2), keepdims=True), 1e-300) * p[:, None, None]
    found = handed_everywhere(p.reshape(1280, -1), x.reshape(320, -1), last)
    return found.reshape(x.shape)


def handed_everywhere(p, x, weight):
    return np.stack([handed(p[:, i], x[:, i], weight) for i in range(x.shape[1])], 1)


@pytest.mark.parametrize("contrastive", [False, True])
def test_real_weights_against_the_formula(contrastive):
    images = cats()
    winning, _ = ExcitationBackprop("features.17", contrastive).winning(mobilenet(), images, TARGETS)
    with torch.no_grad():
        lower = mobilenet().features[:18](images)
        upper = mobilenet().features[18](lower)
    assert lower.amin() < 0
    for i, target in enumerate(TARGETS):
        expected = mobilenet_by_hand(array(lower[i]), array(upper[i]), target)
        if contrastive:
            expected -= mobilenet_by_hand(array(lower[i]), array(upper[i]), target, sign=-1)
            assert expected.min() < 0
        np.testing.assert_allclose(winning[i], expected, atol=1e-7)


def test_contrast_is_rectified():
    images = cats()
    method = ExcitationBackprop("features.13", contrastive=True)
    winning, _ = method.winning(mobilenet(), images, TARGETS)
    expected = min_max(upsample(winning.sum(1).relu(), (224, 224)))
    close(method(mobilenet(), images, TARGETS), expected, 1e-6)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer3"), ("tiny", "features.1")])
def test_probability_is_neither_made_nor_lost_nor_negative(name, layer, images, targets):
    winning, logits = ExcitationBackprop(layer).winning(build(name), images, targets)
    assert winning.amin() >= 0
    close(winning.sum((1, 2, 3)), torch.ones(2), 1e-5)
    close(logits, build(name)(images).detach(), 0.0)


def test_what_is_excited_by_nothing_hands_nothing_on():
    winning, _ = ExcitationBackprop("features").winning(
        Head([[-1.0, -2.0], [0.0, -1.0]]), torch.ones(1, 2, 4, 4), torch.tensor([0])
    )
    assert not winning.any()


class Block(nn.Module):
    """A shortcut, a gate and a concatenation, written in one of two ways."""

    def __init__(self, in_place):
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)
        self.in_place = in_place

    def forward(self, images):
        x = self.stem(images)
        x = F.relu(x, inplace=self.in_place)
        y = self.inner(x)
        gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        if self.in_place:
            z = y.clone()
            z += x
            z *= gate
            z.relu_()
        else:
            z = (gate * (y + x)).relu()
        return self.head(torch.cat([x, z], 1).mean((2, 3)))


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place"])
def test_shortcuts_share_by_their_positive_terms_and_gates_hand_on(in_place):
    model = fill(Block(in_place), head_gain=1.0)
    images = torch.from_numpy(np.sin(np.arange(2 * 3 * 16 * 16)).astype(np.float32)).view(2, 3, 16, 16)
    targets = torch.tensor([1, 2])
    winning, logits = ExcitationBackprop("stem").winning(model, images, targets)
    close(logits, model(images).detach(), 0.0)
    inner = array(model.inner.weight)[:, :, 0, 0]
    with torch.no_grad():
        x = model.stem(images).relu()
        y = model.inner(x)
        z = (torch.sigmoid(y.mean((2, 3), keepdim=True)) * (y + x)).relu()
    for i, target in enumerate(targets):
        a, b = array(x[i]).reshape(4, -1), array(y[i]).reshape(4, -1)
        top = np.concatenate([a, array(z[i]).reshape(4, -1)])
        p = handed(np.eye(3)[target], top.mean(1), array(model.head.weight))
        p = top / np.maximum(top.sum(1, keepdims=True), 1e-300) * p[:, None]
        direct, through = p[:4], p[4:]
        total = a + np.maximum(b, 0)
        shortcut, inside = (
            through * np.divide(part, total, out=np.zeros_like(total), where=total > 0)
            for part in (a, np.maximum(b, 0))
        )
        expected = direct + shortcut + handed_everywhere(inside, a, inner)
        np.testing.assert_allclose(winning[i].reshape(4, -1), expected, atol=1e-6)


def test_nothing_is_recorded_where_no_gradient_is():
    with excitation():
        assert F.linear(torch.ones(1, 2), torch.ones(1, 2)).tolist() == [[2.0]]


def test_it_costs_one_forward_that_gives_the_scores_too(tiny, images, targets):
    calls = []
    tiny.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    for contrastive in (False, True):
        calls.clear()
        method = ExcitationBackprop("features.3", contrastive)
        scores = method.explain(tiny, images, targets).scores
        assert calls == [2]
        assert method.single_forward
        close(scores, tiny(images).softmax(1)[[0, 1], targets].detach(), 1e-6)


METHODS = [ExcitationBackprop("features.5"), ExcitationBackprop("features.1", contrastive=True)]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("value", [0.0, torch.nan, -100.0])
def test_odd_heads_give_finite_maps(method, value, tiny, images, targets):
    nn.init.constant_(tiny.fc.weight, value)
    assert method(tiny, images, targets).isfinite().all()


@pytest.mark.usefixtures("unchecked")
def test_nothing_between_image_and_map_waits_for_the_host(tiny, images, targets, sync_spy):
    method = ExcitationBackprop(tiny.features[1])
    method(tiny, images, targets)
    with sync_spy:
        method(tiny, images, targets)


def test_a_layer_without_a_grid_is_refused(tiny, images, targets):
    with pytest.raises(ValueError, match=r"target_layer Linear gives features of shape \(2, 5\).*no grid"):
        ExcitationBackprop("fc")(tiny, images, targets)
