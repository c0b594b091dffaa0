"""One image explained: the saliency map, the base method's beside it, and the score of the class."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.engine.fusion import smooth
from sess_lightning.evaluation.datasets import read_pixels
from sess_lightning.evaluation.experiment import Experiment
from sess_lightning.evaluation.weights import Network
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import classify, log_scores, predict
from sess_lightning.introspection.probabilities import warn_of_probabilities
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.ops import min_max
from sess_lightning.reporting.panels import Panel, displayed, overlay
from sess_lightning.types import SaliencyMethod


class ImageExplanation(NamedTuple):
    """An image, and the evidence for one class on it.

    Attributes:
        panel: The image and the maps over it, as ``sess_lightning.reporting.panels.sheet`` lays them out.
        target: The explained class.
        probability: Probability of that class on the whole image.
        maps: Method's name -> map in [0, 1], (h, w) of the image as the model saw it; the base of a SESS
            comes first. Maps of SESS are smoothed.
    """

    panel: Panel
    target: int
    probability: float
    maps: dict[str, Float[Tensor, "h w"]]


def explain_image(
    path: str | Path,
    network: Network,
    method: SaliencyMethod | None = None,
    target: int | str | None = None,
    *,
    size: int = 224,
    device: torch.device | str = "cpu",
) -> ImageExplanation:
    """Explain a class on the image in a file.

    Args:
        path: The file.
        network: The model, the normalisation it expects and its class names.
        method: What explains; None is ``SESS(GradCAM())``.
        target: Index or name of the class; None is the predicted one.
        size: Shorter side of the image as the model sees it, px; a model that takes squares of one size only
            gets these.
        device: Where to compute; the model is moved there.

    Raises:
        BrokenSampleError: If the file cannot be read as an image.
        ValueError: If the model has no such class.
    """
    path, model = Path(path), network.model.to(device)
    method = SESS(GradCAM()) if method is None else method
    images = _read(path, network, size).to(device)
    logits = _logits(model, images)
    warn_of_probabilities("explain_image", logits)
    chosen = _class_index(target, network.class_names, logits)
    targets = torch.tensor([chosen], device=device)
    probability = float(log_scores(logits, targets, method.activation).exp())
    methods = [method.base, method] if isinstance(method, SESS) else [method]
    maps = {type(m).__name__: _for_display(m, m(model, images, targets))[0] for m in methods}
    label = dict(enumerate(network.class_names)).get(chosen, f"class {chosen}")
    caption = "\n".join([f"target: {label}", f"probability: {probability:.3f}", *map(str, methods)])
    picture = displayed(images, (network.mean, network.std))[0]
    overlays = {name: overlay(picture, saliency) for name, saliency in maps.items()}
    panel = Panel(picture, overlays, caption, label=label, title=path.name)
    return ImageExplanation(panel, chosen, probability, maps)


def _read(path: Path, network: Network, size: int) -> Float[Tensor, "1 C h w"]:
    framing = Experiment(size=size, antialias=True, mean=network.mean, std=network.std)
    return framing.framed_for(network.model).images(read_pixels(path))


def _logits(model: nn.Module, images: Float[Tensor, "1 C h w"]) -> Float[Tensor, "1 N"]:
    with explaining(model), torch.no_grad():
        return classify(model, images.clone())


def _for_display(method: SaliencyMethod, maps: Float[Tensor, "1 h w"]) -> Float[Tensor, "1 h w"]:
    if not isinstance(method, SESS):
        return maps
    return min_max(maps if method.smoothing else smooth(maps))


def _class_index(target: int | str | None, names: tuple[str, ...], logits: Float[Tensor, "1 N"]) -> int:
    if target is None:
        return int(predict(logits))
    folded = [name.casefold() for name in names]
    if (asked := str(target).casefold()) in folded:
        return folded.index(asked)
    count = max(logits.shape[1], 2)  # A single logit tells two classes apart.
    if not str(target).removeprefix("-").isdecimal():
        near = [name for name, plain in zip(names, folded, strict=True) if asked in plain]
        near = near[:5] or get_close_matches(str(target), names, 3)
        hint = f" (similar: {', '.join(near)})" if near else ""
        raise ValueError(
            f"target: {target!r} is not one of the {len(names)} class names{hint}; give an index, "
            f"0 to {count - 1}."
        )
    if not 0 <= int(target) < count:
        raise ValueError(f"target: the model has the classes 0 to {count - 1}, got {target}.")
    return int(target)
