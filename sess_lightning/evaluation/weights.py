"""From a name and a file to a model; no code in a file is ever unpickled."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Layout: TypeAlias = Literal["plain", "torchray"]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE = (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)


class Network(NamedTuple):
    """A model and the images it expects.

    Attributes:
        model: The classifier, in evaluation mode.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.
        class_names: Names of the head's outputs, where known.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()


def load_network(
    name: str,
    weights: str | Path | None = "DEFAULT",
    layout: Layout = "plain",
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Network:
    """Build a torchvision classifier and load its weights.

    Args:
        name: Torchvision's name, such as ``"resnet50"``.
        weights: A file (``.ckpt`` of Lightning, ``.pth`` or ``.pt`` state dict, ``.safetensors``), a name of
            torchvision's weights such as ``"IMAGENET1K_V1"``, or None for random weights.
        layout: ``"torchray"`` for the VGG-16 and ResNet-50 of the Pointing Game's literature: converted from
            Caffe, with their own head, padding and mean.
        num_classes: Outputs of the head; None reads the number from a file, else it is the architecture's
            own.
        mean: Mean per channel of the images the model was trained on; None is what comes with the weights.
        std: Likewise, the standard deviation.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the architecture is unknown, or the weights do not fit.
    """
    from torchvision.models import get_model, get_model_weights, list_models

    if name not in list_models():
        raise ValueError(f"model: torchvision knows no {name!r}; see torchvision.models.list_models().")
    if weights is not None and _is_file(weights):
        network = _from_file(name, weights, layout, num_classes)
    else:
        chosen = get_model_weights(name)[str(weights)] if weights is not None else None
        options = {"num_classes": num_classes} if num_classes is not None else {}
        model = get_model(name, weights=chosen, **options).eval()
        names = tuple(chosen.meta["categories"]) if chosen is not None else ()
        network = Network(model, *_normalisation(chosen), names)
    return network._replace(mean=mean or network.mean, std=std or network.std)


def _from_file(name: str, path: str | Path, layout: Layout, num_classes: int | None) -> Network:
    from torchvision.models import get_model

    state = read_state(path)
    if layout == "torchray":
        return Network(_torchray(name, state).eval(), *CAFFE)
    wanted = get_model(name, weights=None)
    state = fit_names(state, set(wanted.state_dict()), str(path))
    classes = num_classes or len(state[f"{last_linear(wanted)}.weight"])
    model = get_model(name, weights=None, num_classes=classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit {name}: {error}") from error
    return Network(model.eval(), *IMAGENET)


def _is_file(weights: str | Path) -> bool:
    if Path(weights).is_file():
        return True
    if Path(weights).suffix:
        raise FileNotFoundError(f"weights: {weights} is no file.")
    return False


def _normalisation(weights: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if weights is None:
        return IMAGENET
    preset = weights.transforms()
    return tuple(preset.mean), tuple(preset.std)


def last_linear(model: nn.Module) -> str:
    """Return the name of a model's last linear layer.

    Raises:
        ValueError: If it has none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be its head.")
    return str(names[-1])


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, without unpickling anything but tensors.

    Raises:
        ValueError: If the file holds something else, or is damaged.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # On damaged files, readers raise all kinds of errors.
        raise ValueError(f"{path}: {_complaint(Path(path), error)}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    state = (
        {name: value for name, value in held.items() if isinstance(value, Tensor)}
        if isinstance(held, Mapping)
        else {}
    )
    if not state:
        raise ValueError(f"{path}: holds no state dict.")
    return state


def _complaint(path: Path, error: Exception) -> str:
    """Say what is wrong with a weights file, and what to do."""
    with path.open("rb") as file:
        head = file.read(40)
    if not head:
        return "is empty; download or save it again."
    if head.isascii() and head.decode().replace("\n", " ").replace("\r", " ").isprintable():
        text = head.decode()
        return f"holds text, {text!r}: a page or a pointer in the weights' place; fetch the file itself."
    if "TorchScript" in str(error):
        return "is a TorchScript archive; save model.state_dict() instead."
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        return (
            "holds more than tensors, which is not loaded, as it could run anything; save "
            f"model.state_dict() instead, or safetensors ({reason})."
        )
    return f"is cut short or damaged ({reason}); copy or download it again."


def fit_names(state: Mapping[str, Tensor], wanted: set[str], source: str) -> dict[str, Tensor]:
    """Strip what a LightningModule or a wrapper put in front of the names (``model.``, ``module.``, ...).

    Raises:
        ValueError: If no prefix makes all wanted names appear.
    """
    some = max(wanted, key=len)
    prefixes = sorted({name[: -len(some)] for name in state if name.endswith(some)}, key=len)
    for prefix in prefixes:
        if all(prefix + name in state for name in wanted):
            return {name: state[prefix + name] for name in wanted}
    missing = sorted(wanted - set(state))[:5]
    raise ValueError(f"{source}: the weights do not fit the model; not there: {missing}.")


class SpatialMean(nn.Module):
    """Mean over places of a fully convolutional head's output: (B, N, h, w) to (B, N)."""

    def forward(self, scores: Float[Tensor, "B N h w"]) -> Float[Tensor, "B N"]:
        """Return the mean."""
        return scores.mean((2, 3))


def _torchray(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    if name not in _TORCHRAY:
        raise ValueError(f'model: layout="torchray" knows {" and ".join(_TORCHRAY)}, not {name!r}.')
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
