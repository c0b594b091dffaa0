"""What a model is: its logits, its scores, its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.logits import classify


@dataclass
class Tap:
    """What passed through a layer.

    Attributes:
        features: The layer's output, detached, with gradients on: differentiate the head's output by it.
    """

    features: Tensor | None = None


@contextmanager
def recording(layer: nn.Module) -> Iterator[Tap]:
    """Cut the graph at a layer: run the forward under ``no_grad`` and only what follows is recorded.

    A layer that is called several times is cut at its last call.
    """
    tap = Tap()

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        features = first_tensor(output)
        if features.is_inference():
            raise RuntimeError(
                "The model's forward runs the target layer in its own inference_mode, which no gradient "
                "leaves; use no_grad there, or name a target_layer outside of it."
            )
        features = features.detach().requires_grad_()
        tap.features = features
        torch.set_grad_enabled(True)  # The surrounding no_grad puts the mode back.
        # The clone lets whatever follows work in place: a leaf may not be written to.
        return with_first_tensor(output, features.clone())

    handle = layer.register_forward_hook(cut)
    try:
        yield tap
    finally:
        handle.remove()


def head_forward(
    model: nn.Module, layer: nn.Module, images: Float[Tensor, "B C H W"]
) -> tuple[Float[Tensor, "B N"], Tensor]:
    """Run one forward and return the logits and the layer's features, with a graph from these to those.

    Raises:
        RuntimeError: If the layer never ran.
    """
    # A backbone inside the model's own `no_grad` switches recording off again on its way out; retried, its
    # surroundings have gradients on.
    for grad in (False, True):
        with recording(layer) as tap, torch.set_grad_enabled(grad):
            logits = classify(model, images)
        if logits.requires_grad:
            break
    if tap.features is None:
        raise RuntimeError(
            f"target_layer {type(layer).__name__} did not run in the model's forward, so its features are "
            "unknown; name one that does. Scripted, traced and exported modules cannot be looked into."
        )
    return logits, tap.features


def gradient(outputs: Float[Tensor, " B"], inputs: Tensor, retain_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of ``outputs`` by ``inputs``; no ``.grad`` is touched.

    Raises:
        RuntimeError: If no gradient flows from the one to the other.
    """
    found = _gradient(outputs.float().sum(), inputs, retain_graph)
    if found is None:
        raise RuntimeError(
            "No gradient flows from the model's logits back to the target layer or the image: the forward "
            "detaches it, or runs it under no_grad or under a checkpoint with use_reentrant=True. "
            "Name a later target_layer, or change the forward."
        )
    return found


def _gradient(output: Float[Tensor, ""], inputs: Tensor, retain_graph: bool = False) -> Tensor | None:
    if not output.requires_grad:
        return None
    try:
        return torch.autograd.grad(output, inputs, retain_graph=retain_graph, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "The model's forward runs under a checkpoint with use_reentrant=True, which shows gradients to "
            "backward() only; give it use_reentrant=False."
        ) from error


def first_tensor(output: Any) -> Tensor:
    """Return a layer's output, or the first tensor in a tuple or dict of outputs.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)) or isinstance(output, Mapping):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(
        f"target_layer must return a tensor, or a tuple or dict that holds one, got {type(output).__name__}; "
        "name another layer."
    )


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return a layer's output with another first tensor."""
    if isinstance(output, Tensor):
        return tensor
    first = first_tensor(output)
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if value is first)
        replaced = type(output)(output)  # type: ignore[call-arg]
        replaced[key] = tensor  # type: ignore[index]
        return replaced
    values = [tensor if value is first else value for value in output]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
