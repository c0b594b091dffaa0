"""From a name and a file to a model; no code in a file is ever unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from sess_lightning.evaluation.torchray import torchray

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
        size: Shorter side of the images it was built for, px, where known.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    size: int | None = None


def load_network(
    name: str | None = None,
    weights: str | Path | None = "DEFAULT",
    layout: Layout = "plain",
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Network:
    """Build a classifier by name and load its weights.

    Args:
        name: Torchvision's name such as ``"resnet50"``, ``"timm/NAME"``, or ``"hf/NAME"`` for an image
            classifier of Hugging Face: a local folder or a name on its hub. None is the first of torchvision
            whose ImageNet weights are on this machine.
        weights: A file (``.ckpt`` of Lightning, ``.pth`` or ``.pt`` state dict, ``.safetensors``),
            ``"local"`` for pretrained weights that are on this machine, a name of the library's weights such
            as ``"DEFAULT"`` or ``"IMAGENET1K_V1"``, which are downloaded if need be, or None for random ones.
        layout: ``"torchray"`` for the VGG-16 and ResNet-50 of the Pointing Game's literature: converted from
            Caffe, with their own head, padding and mean.
        num_classes: Outputs of the head; None reads the number from a file, else it is the architecture's
            own.
        mean: Mean per channel of the images the model was trained on; None is what comes with the weights.
        std: Likewise, the standard deviation.

    Raises:
        FileNotFoundError: If a file does not exist.
        ImportError: If the library is not installed.
        ValueError: If the architecture is unknown, the weights do not fit, or they are not on this machine.
    """
    network = _named(name, weights, layout, num_classes)
    return network._replace(mean=mean or network.mean, std=std or network.std)


def _named(name: str | None, weights: str | Path | None, layout: Layout, num_classes: int | None) -> Network:
    from sess_lightning.evaluation import sources

    name = sources.first_on_this_machine() if name is None else name
    library, _, rest = name.partition("/")
    if layout == "torchray":
        if weights is None or not is_file(weights):
            raise ValueError(f'model: layout="torchray" needs a file of weights, got {weights!r}.')
        return Network(torchray(name, read_state(weights)).eval(), *CAFFE)
    if library == "timm":
        return sources.of_timm(rest, weights, num_classes)
    if library == "hf":
        return sources.of_hugging_face(rest, weights, num_classes)
    return sources.of_torchvision(name, weights, num_classes)


def from_file(
    name: str, build: Callable[[int | None], nn.Module], path: str | Path, num_classes: int | None
) -> nn.Module:
    """Build a model with the head that the weights in a file have, and load them.

    Args:
        name: The model's, for messages.
        build: Makes the model with a number of classes; None is the architecture's own.
        path: The file.
        num_classes: As for ``load_network``.

    Raises:
        ValueError: If the weights do not fit.
    """
    wanted = build(num_classes)
    state = fit_names(read_state(path), set(wanted.state_dict()), str(path))
    if num_classes is None:
        wanted = build(len(state[f"{head_of(wanted)}.weight"]))
    return loaded(wanted, state, name, path)


def loaded(model: nn.Module, state: Mapping[str, Tensor], name: str, path: str | Path) -> nn.Module:
    """Load the state that a file holds into a model, and return the model.

    Raises:
        ValueError: If it does not fit; the message names both.
    """
    try:
        model.load_state_dict(fit_names(state, set(model.state_dict()), str(path)))
    except RuntimeError as error:
        reason = str(error).partition("\n\t")[2].partition("\n")[0]
        raise ValueError(f"{path}: the weights do not fit {name}: {reason}") from error
    return model


def is_file(weights: str | Path) -> bool:
    """Return whether weights are a file, not a name.

    Raises:
        FileNotFoundError: If they look like a file and there is none.
    """
    if Path(weights).is_file():
        return True
    if Path(weights).suffix or len(Path(weights).parts) > 1:
        raise FileNotFoundError(f"weights: {weights} is not a file.")
    return False


def head_of(model: nn.Module) -> str:
    """Return the name of the layer that makes a model's logits: the last linear one, else convolution.

    Raises:
        ValueError: If there is neither.
    """
    for kind in (nn.Linear, nn.Conv2d):
        names: list[str] = [name for name, module in model.named_modules() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise ValueError(f"{type(model).__name__} has no linear layer and no convolution to be its head.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, without unpickling anything but tensors.

    Raises:
        ValueError: If the file contains something else, or is damaged.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError(f"{path}: safetensors is not installed; pip install safetensors.") from error
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
        raise ValueError(f"{path}: contains no state dict.")
    return state


def _complaint(path: Path, error: Exception) -> str:
    """Say what is wrong with a weights file, and what to do."""
    with path.open("rb") as file:
        head = file.read(40)
    if not head:
        return "is empty; download or save it again."
    if head.isascii() and head.decode().replace("\n", " ").replace("\r", " ").isprintable():
        text = head.decode()
        return f"contains text, {text!r}: a web page or a pointer, not weights; download the file itself."
    if "TorchScript" in str(error):
        return "is a TorchScript archive; save model.state_dict() instead."
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        return (
            "contains more than tensors, and loading that could run any code; save "
            f"model.state_dict() instead, or safetensors ({reason})."
        )
    return f"is truncated or damaged ({reason}); copy or download it again."


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
    raise ValueError(f"{source}: the weights do not fit the model; missing: {missing}.")
