"""Decided before a method runs: whether the model has its layers, and the method that suits it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass

from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.layers import check_layer, find_target_layer
from sess_lightning.introspection.search import NoPlacesError
from sess_lightning.methods.adapters import Adapter
from sess_lightning.methods.cam import GradCAM
from sess_lightning.methods.gradient import Gradient
from sess_lightning.methods.sess import SESS
from sess_lightning.types import SaliencyMethod


def check_layers(model: nn.Module, *methods: SaliencyMethod) -> None:
    """Refuse methods whose target layer the model does not have, without running anything.

    Args:
        model: The model to explain.
        methods: The methods, with those they are made of. Those of other packages must exist there.

    Raises:
        ValueError: Naming the most similar layers.
        ImportError: If a method's package is not installed.
    """
    for method in _parts(*methods):
        if isinstance(method, Adapter):
            method.check()
        if (layer := getattr(method, "target_layer", None)) is not None:
            check_layer(model, layer)


def find_layers(model: nn.Module, image: Float[Tensor, "1 C H W"], *methods: SaliencyMethod) -> None:
    """Find the layer of methods that name none, which takes as long as many forward passes, and remember it.

    Args:
        model: Any classifier.
        image: As the model takes it.
        methods: The methods, with those they are made of.
    """
    own = (method for method in _parts(*methods) if not isinstance(method, Adapter))
    if any(getattr(method, "target_layer", "") is None for method in own):
        with suppress(Exception):  # It is left to the run, which raises it about its own images.
            find_target_layer(model, image)


def _parts(*methods: SaliencyMethod) -> Iterator[SaliencyMethod]:
    """Yield methods, and those they are made of."""
    for method in methods:
        yield method
        if is_dataclass(method):
            held = (getattr(method, field.name) for field in fields(method))
            yield from _parts(*(value for value in held if isinstance(value, SaliencyMethod)))


def default_method(model: nn.Module, image: Float[Tensor, "1 C H W"]) -> SaliencyMethod:
    """Return the default method for a model.

    ``SESS(GradCAM())``, or ``SESS(Gradient())`` if no layer could lie on the image, as in an MLP. The forward
    pass of the image that finds Grad-CAM's layer decides.

    Args:
        model: Any classifier.
        image: As the model takes it.
    """
    # Any other error is left to the run, which raises it about its own images.
    with suppress(Exception):
        try:
            find_target_layer(model, image)
        except NoPlacesError:
            return SESS(Gradient())
    return SESS(GradCAM())
