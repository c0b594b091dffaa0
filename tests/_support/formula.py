"""What needs no random generator and no package under test.

Weights and pictures from exact integer arithmetic (splitmix64), the same on every machine and version, and
the paper's equation 2 by its words.
"""

from functools import cache

import numpy as np
import torch
import torchvision
from torch import nn

TARGET_LAYERS = {"tiny": "features.5", "resnet18": "layer4", "resnet50": "layer4", "vgg16": "features.29"}
PART = 1 << 16
"""Numbers that a processor's cache holds: three times as fast as all at once."""


class Tiny(nn.Module):
    """224 px -> 7 x 7 features of 24 channels -> 5 classes, in a millisecond."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 8, 8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(24, 5)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


def uniform(count, stream):
    """``count`` float32 in [-1, 1): the 24 top bits of splitmix64(stream * 2**32 + index)."""
    values = np.empty(count, np.float32)
    for first in range(0, count, PART):
        part = values[first : first + PART]
        z = np.arange(first, first + len(part), dtype=np.uint64)
        z += np.uint64((stream << 32) + 0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
        part[:] = (z >> np.uint64(40)) / 2.0**23 - 1
    return values


def fill(model, head_gain=8.0):
    """Draw the i-th parameter from stream i.

    Weights lie within sqrt(6 / fan_in), the head's within ``head_gain`` times that, biases within 0.05; batch
    norm is the identity plus a bias within 0.1, the last one of a residual block a quarter of it.
    """
    owners = dict(model.named_modules())
    head = [name for name, _ in model.named_parameters() if name.endswith("weight")][-1]
    for i, (name, parameter) in enumerate(model.named_parameters(), 1):
        values = torch.from_numpy(uniform(parameter.numel(), i)).reshape(parameter.shape)
        path, _, kind = name.rpartition(".")
        if isinstance(owners[path], nn.BatchNorm2d):
            block, _, leaf = path.rpartition(".")
            last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}.get(type(owners[block]).__name__)
            values = values * 0.1 if kind == "bias" else torch.full_like(values, 0.25 if leaf == last else 1)
        elif kind == "bias":
            values = values * 0.05
        else:
            values = values * np.float32(np.sqrt(6 / parameter[0].numel()))
        parameter.data = values * head_gain if name == head else values
    return model.eval()


@cache
def build(name):
    """One of the goldens' models; shared by all tests, which must give it back as it was."""
    if name == "tiny":
        return fill(Tiny())
    with torch.device("meta"):  # Nothing is drawn in vain.
        model = torchvision.models.get_model(name, weights=None, num_classes=20)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return fill(model)


@cache
def picture(height, width, stream):
    """(3, height, width), about unit variance: six oriented gratings on a soft background, and noise."""
    side = min(height, width)
    y, x = np.meshgrid((np.arange(height) + 0.5) / side, (np.arange(width) + 0.5) / side, indexing="ij")
    channel = np.arange(3)[:, None, None]
    image = np.sin(2.1 * y + channel) * np.cos(1.3 * x - channel) * 0.5
    for q in uniform(48, 1000 + stream).astype(np.float64).reshape(6, 8):
        cy, cx = (q[0] + 1) / 2 * height / side, (q[1] + 1) / 2 * width / side
        spread = 0.08 + 0.10 * (q[2] + 1) / 2
        envelope = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * spread * spread))
        wave = np.cos(2 * np.pi * (8 + 8 * q[3]) * ((x - cx) * q[4] + (y - cy) * q[5]))
        image += 2 * envelope * wave * np.cos(3 * q[6] + 2 * channel) + 0.7 * envelope * q[7]
    image += 0.3 * uniform(3 * height * width, 5000 + stream).reshape(3, height, width)
    return torch.from_numpy(image.astype(np.float32))


def bilinear(canvas, size):
    """Half-pixel bilinear resizing by its definition, float64."""

    def sample(length, target):
        centres = np.clip((np.arange(target) + 0.5) * length / target - 0.5, 0, length - 1)
        low = np.floor(centres).astype(int)
        return low, np.minimum(low + 1, length - 1), centres - low

    (y0, y1, fy), (x0, x1, fx) = (sample(n, m) for n, m in zip(canvas.shape, size, strict=True))
    rows = canvas[y0] * (1 - fy)[:, None] + canvas[y1] * fy[:, None]
    return rows[:, x0] * (1 - fx) + rows[:, x1] * fx


def equation_2(maps, weights, plan, which, theta, fusion="mean"):
    """The paper's words, one canvas after the other, float64; above 0 is above 1e-6 of a window's weight."""
    where = [(scale, box) for scale, boxes in zip(plan.scales, plan.boxes, strict=True) for box in boxes]
    values = []
    for weight, number, coarse in zip(weights.double().numpy(), which, maps.double().numpy(), strict=True):
        scale, (x0, y0, x1, y1) = where[number]
        canvas = np.zeros(scale)
        canvas[y0:y1, x0:x1] = bilinear(coarse, plan.window_size)
        values.append(weight * bilinear(canvas, plan.size))
    values = np.stack(values)
    voting = values > np.maximum(theta, 1e-6 * weights.double().numpy())[:, None, None]
    if fusion == "max":
        return np.where(voting, values, 0).max(0)
    if fusion == "average":
        return values.mean(0)
    return np.where(voting, values, 0).sum(0) / np.maximum(voting.sum(0), 1)
