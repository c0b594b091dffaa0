"""A net of two convolutions, the methods that are tried on it, and shapes of answers."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from formula import fill
from sess_lightning.methods import SESS, GradCAM, GroupCAM, GuidedBackprop

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


def made(net, *args):
    """``net`` with the formula's weights: equal for equal shapes."""
    return fill(net(*args), head_gain=1.0)


Named = namedtuple("Named", ["logits", "features"])


class Answer(dict):
    """As Hugging Face answers: a dict whose items are attributes, too."""

    def __getattr__(self, name):
        return self[name]


def maps_of(model, images, method=None):
    return (method or GradCAM("features")).explain(model, images, torch.tensor([0, 1]))


def same(got, expected, tolerance=0.0):
    torch.testing.assert_close(got.maps, expected.maps, atol=tolerance, rtol=0)
    torch.testing.assert_close(got.scores, expected.scores, atol=tolerance, rtol=0)


class LeNet(nn.Sequential):
    """Grey squares of 28 px, and nothing else."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
