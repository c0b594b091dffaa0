"""The VGG-16 and ResNet-50 of the Pointing Game's literature, from TorchRay's files: converted from Caffe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SpatialMean(nn.Module):
    """Mean over places of a fully convolutional head's output: (B, N, h, w) to (B, N)."""

    def forward(self, scores: Float[Tensor, "B N h w"]) -> Float[Tensor, "B N"]:
        """Return the mean."""
        return scores.mean((2, 3))


def torchray(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """Build one of both networks with the weights of TorchRay's file.

    Raises:
        ValueError: If it is another network, or the weights do not fit.
    """
    if name not in _TORCHRAY:
        raise ValueError(f'model: layout="torchray" supports {" and ".join(_TORCHRAY)}, not {name!r}.')
    build, rename, head = _TORCHRAY[name]
    renamed = rename(state)
    with torch.device("meta"):  # No random initialisation: all weights come from the file.
        model = build(len(renamed.get(f"{head}.weight", ())))
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = True  # As Caffe pools.
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights are not of TorchRay's {name}: {error}") from error
    return model


class _ConvolutionalVGG(nn.Module):
    """VGG-16 with convolutions for linear layers, so that images need not be square."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        from torchvision.models import vgg16

        self.features = vgg16(weights=None).features
        self.classifier = nn.Sequential(
            nn.Conv2d(512, 4096, 7), nn.ReLU(True), nn.Dropout(),
            nn.Conv2d(4096, 4096, 1), nn.ReLU(True), nn.Dropout(),
            nn.Conv2d(4096, num_classes, 1), SpatialMean(),
        )  # fmt: skip

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N"]:
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _vgg16_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = dict(state)
    if "classifier.2.weight" in state:  # Numbered without the dropout layers.
        places = {"2": "3", "4": "6"}
        renamed = {
            re.sub(r"^classifier\.([24])\.", lambda found: f"classifier.{places[found[1]]}.", key): value
            for key, value in state.items()
        }
    for key, side in {"classifier.0.weight": 7, "classifier.3.weight": 1, "classifier.6.weight": 1}.items():
        if key in renamed:
            renamed[key] = renamed[key].reshape(len(renamed[key]), -1, side, side)
    return _red_first(renamed, "features.0.weight")


def _caffe_resnet50(num_classes: int) -> nn.Module:
    from torchvision.models import resnet50

    model: Any = resnet50(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=True)
    model.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True)
    for first in (model.layer2[0], model.layer3[0], model.layer4[0]):
        first.conv1.stride, first.conv2.stride = (2, 2), (1, 1)
    caffe: nn.Module = model
    return caffe


def _resnet50_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Batch norms were saved as pairs of normalising and scaling.
    renamed = {re.sub(r"(bn\d|downsample\.\d)\.[01]\.", r"\1.", key): value for key, value in state.items()}
    if "fc.weight" in renamed:
        renamed["fc.weight"] = renamed["fc.weight"].flatten(1)
    return _red_first(renamed, "conv1.weight")


def _red_first(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """Reverse the channels of the first convolution: Caffe's images are BGR."""
    return {**state, key: state[key].flip(1)} if key in state else state


_TORCHRAY = {
    "vgg16": (_ConvolutionalVGG, _vgg16_names, "classifier.6"),
    "resnet50": (_caffe_resnet50, _resnet50_names, "fc"),
}
