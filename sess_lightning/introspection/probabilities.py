"""Models that end in a softmax or a sigmoid: what they return is taken back to logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

Kind: TypeAlias = Literal["softmax", "log_softmax", "sigmoid"]

_KINDS: dict[str, Kind] = {
    "softmax": "softmax", "special_softmax": "softmax", "log_softmax": "log_softmax",
    "special_log_softmax": "log_softmax", "sigmoid": "sigmoid", "special_expit": "sigmoid",
}  # fmt: skip
SUMS_TO_ONE = 1e-3
"""How far the probabilities of an image may be from 1 together; those of half precision ten times as far."""
ALIKE = 1e-6
"""How far outputs may be from a softmax's results and still be these: cast, or kept from 0."""


class Ending(NamedTuple):
    """What a model's outputs went through last.

    Attributes:
        kind: A softmax, its logarithm, or a sigmoid.
        number: Which of the forward pass's it is, -1 being the last; None where that is not known.
    """

    kind: Kind
    number: int | None = None

    def __str__(self) -> str:
        """Return what is to be said of such outputs."""
        kind = "log-probabilities" if self.kind == "log_softmax" else f"probabilities of a {self.kind}"
        return f"its outputs are {kind}, taken back to logits"


class Endings(TorchFunctionMode):
    """Notes what the softmaxes and sigmoids of a forward pass are given, and what they return.

    Attributes:
        passed: Those so far: kind, argument, result.
    """

    def __init__(self) -> None:
        self.passed: list[tuple[Kind, Tensor, Tensor]] = []

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        kind = _KINDS.get(getattr(func, "__name__", ""))
        given = args[0] if args else (kwargs or {}).get("input")
        # Those of attention have more axes, and would fill the memory.
        if kind is not None and isinstance(given, Tensor) and isinstance(output, Tensor) and given.ndim < 3:
            self.passed.append((kind, given, output))
        return output

    def of(self, outputs: Tensor, part: slice = slice(None)) -> Ending | None:
        """Return what outputs went through last, of what passed in a part of the time; None if nothing.

        Reads values: it waits for the device.
        """
        passed = self.passed[part]
        for number in range(-1, -len(passed) - 1, -1):
            if _are_alike(passed[number][2], outputs):
                return Ending(passed[number][0], number)
        return None

    def given(self, outputs: Tensor, ending: Ending) -> Tensor | None:
        """Return the logits that outputs were made of, shaped alike, if they are known."""
        if ending.number is not None and len(self.passed) >= -ending.number:
            _, given, result = self.passed[ending.number]
            return given.reshape(outputs.shape) if result.numel() == outputs.numel() else None
        same = [given for _, given, result in self.passed if is_same(result, outputs)]
        return same[-1].reshape(outputs.shape) if same else None


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one, or views of the same values."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _are_alike(result: Tensor, outputs: Tensor) -> bool:
    if is_same(result, outputs) or result.numel() != outputs.numel():
        return result.numel() == outputs.numel()
    result, outputs = (values.detach().reshape(-1).float() for values in (result, outputs))
    return bool(((result - outputs).abs() <= ALIKE).all())


def ending_of(outputs: Float[Tensor, "B N"], takes_probabilities: bool = False) -> Ending | None:
    """Return what outputs must have gone through, by their values; None if they may be logits.

    Reads values: it waits for the device.

    Args:
        outputs: Of some images.
        takes_probabilities: Whether a loss computed from them takes probabilities, as ``BCELoss`` does.
    """
    values = outputs.detach().float()
    if not values.numel() or not ((values >= 0) & (values <= 1)).all():
        return None
    rounding = SUMS_TO_ONE * (10 if outputs.dtype in (torch.half, torch.bfloat16) else 1)
    if values.shape[1] > 1 and ((values.sum(1) - 1).abs() < rounding).all():
        return Ending("softmax")
    return Ending("sigmoid") if takes_probabilities else None


@contextmanager
def noting(ending: Ending | None) -> Iterator[Endings | None]:
    """Note what the endings of a forward pass are given, if there is one to undo."""
    if ending is None:
        yield None
        return
    with Endings() as endings:
        yield endings


def to_logits(
    outputs: Float[Tensor, "B N"], ending: Ending | None, endings: Endings | None = None
) -> Float[Tensor, "B N"]:
    """Return logits of which a softmax or sigmoid makes the probabilities that a model returned.

    They are what the model's own softmax or sigmoid was given, where that was noted; else logarithms, of the
    odds for a sigmoid. Log-probabilities are logits as they are.

    Args:
        outputs: What the model returned.
        ending: What they went through; None for logits.
        endings: Those of the forward pass that made them.
    """
    if ending is None:
        return outputs
    if endings is not None and (given := endings.given(outputs, ending)) is not None:
        return given
    if ending.kind == "log_softmax":
        return outputs
    outputs = outputs.float()
    if ending.kind == "softmax":
        return outputs.clamp(min=torch.finfo(torch.float32).tiny).log()
    return outputs.logit(eps=torch.finfo(torch.float32).eps / 2)
