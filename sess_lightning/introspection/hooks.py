"""Cutting a model's graph at a layer, and differentiating with respect to its features."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.logits import classify


class NeverRanError(RuntimeError):
    """A layer did not run in the model's forward."""


@dataclass
class Tap:
    """The outputs of a layer's calls.

    Attributes:
        calls: The outputs of the layer's calls that were cut, by index, detached, with gradients on: the
            head's output is differentiated with respect to them.
        count: Number of calls so far, cut or not.
    """

    calls: dict[int, Tensor] = field(default_factory=dict)
    count: int = 0

    @property
    def features(self) -> Tensor | None:
        """The output of the last call that was cut."""
        return self.calls[max(self.calls)] if self.calls else None


@contextmanager
def recording(layer: nn.Module, calls: Collection[int] | None = None) -> Iterator[Tap]:
    """Cut the graph at a layer: in a forward pass under ``no_grad``, only what follows it is recorded.

    Args:
        layer: Where to cut.
        calls: Which of the layer's calls, by number; None is all of them.
    """
    tap = Tap()

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        number, tap.count = tap.count, tap.count + 1
        if calls is not None and number not in calls:
            return output
        features = first_tensor(output)
        if features.is_inference():
            raise RuntimeError(
                "The model's forward runs the target layer in its own inference_mode, through which no "
                "gradient flows; use no_grad there, or name a target_layer outside of it."
            )
        features = features.detach().requires_grad_()
        tap.calls[number] = features
        torch.set_grad_enabled(True)  # The surrounding no_grad restores the mode.
        # The clone allows what follows to work in place: a leaf must not be written to.
        return with_first_tensor(output, features.clone())

    handle = layer.register_forward_hook(cut)
    try:
        yield tap
    finally:
        handle.remove()


def head_forward(
    model: nn.Module, layer: nn.Module, images: Float[Tensor, "B C H W"]
) -> tuple[Float[Tensor, "B N"], Tensor]:
    """Run one forward pass; return the logits and a layer's last features, with a graph between them."""
    logits, calls = cut_forward(model, layer, images)
    return logits, calls[max(calls)]


def cut_forward(
    model: nn.Module,
    layer: nn.Module,
    images: Float[Tensor, "B C H W"],
    calls: Collection[int] | None = None,
) -> tuple[Float[Tensor, "B N"], dict[int, Tensor]]:
    """Run one forward pass, its graph cut at a layer; return the logits and, by number, the features cut off.

    Args:
        model: Any classifier.
        layer: Where to cut.
        images: As the model takes them.
        calls: Which of the layer's calls, by number; None is all of them.

    Raises:
        NeverRanError: If the layer never ran.
    """
    # A backbone inside the model's own `no_grad` switches recording off again on its way out; retried, its
    # surroundings have gradients on.
    for grad in (False, True):
        with recording(layer, calls) as tap, torch.set_grad_enabled(grad):
            logits = classify(model, images)
        if logits.requires_grad:
            break
    if not tap.calls:
        raise NeverRanError(
            f"target_layer {type(layer).__name__} did not run in the model's forward, so its features are "
            "unknown; name one that does. Scripted, traced and exported modules cannot be looked into."
        )
    return logits, tap.calls


def gradient(outputs: Float[Tensor, " B"], inputs: Tensor, retain_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of ``outputs`` with respect to ``inputs``; no ``.grad`` is touched.

    Raises:
        RuntimeError: If no gradient flows from the one to the other.
    """
    return gradients(outputs.float().sum(), {0: inputs}, None, retain_graph)[0]


def gradients(
    outputs: Tensor, inputs: Mapping[int, Tensor], weights: Tensor | None = None, retain_graph: bool = False
) -> dict[int, Tensor]:
    """Return the gradients of a scalar, or of a sum with ``weights``, by several ``inputs``.

    They are zeros where no gradient flows.

    Raises:
        RuntimeError: If no gradient flows to any of them.
    """
    slopes = _differentiated(outputs, [*inputs.values()], weights, retain_graph)
    if all(slope is None for slope in slopes):
        raise RuntimeError(
            "No gradient flows from the model's logits back to the target layer or the image: the forward "
            "detaches it, or runs it under no_grad or under a checkpoint with use_reentrant=True. "
            "Name a later target_layer, or change the forward."
        )
    return {
        name: torch.zeros_like(by) if slope is None else slope
        for (name, by), slope in zip(inputs.items(), slopes, strict=True)
    }


def try_gradient(output: Tensor, inputs: Tensor, weights: Tensor | None = None) -> Tensor | None:
    """Return the gradient of a scalar, or of a sum with ``weights``, by ``inputs``; None if none flows.

    The graph is kept.
    """
    return _differentiated(output, [inputs], weights, retain_graph=True)[0]


def _differentiated(
    output: Tensor, inputs: Sequence[Tensor], weights: Tensor | None, retain_graph: bool
) -> Sequence[Tensor | None]:
    if not output.requires_grad:
        return [None] * len(inputs)
    try:
        return torch.autograd.grad(output, inputs, weights, retain_graph=retain_graph, allow_unused=True)
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
    values = [*output.values()] if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(
        f"target_layer must return a tensor, or a tuple or dict that holds one, got {type(output).__name__}; "
        "name another layer."
    )


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return a layer's output with its first tensor replaced."""
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
