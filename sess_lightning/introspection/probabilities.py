"""Models that end in a softmax or a sigmoid: their outputs are turned back into logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from sess_lightning.types import SESSWarning

Kind: TypeAlias = Literal["softmax", "log_softmax", "sigmoid"]

_KINDS: dict[str, Kind] = {
    "softmax": "softmax", "special_softmax": "softmax", "log_softmax": "log_softmax",
    "special_log_softmax": "log_softmax", "sigmoid": "sigmoid", "special_expit": "sigmoid",
}  # fmt: skip
SUMS_TO_ONE = 1e-3
"""How far an image's probabilities may be from a sum of 1; ten times as far in half precision."""
ALIKE = 1e-6
"""How far outputs may be from a softmax's results and still count as these: cast, or clamped away from 0."""


class Ending(NamedTuple):
    """The last function that a model's outputs went through.

    Attributes:
        kind: A softmax, its logarithm, or a sigmoid.
        number: Its index among those of the forward pass, -1 for the last; None if unknown.
    """

    kind: Kind
    number: int | None = None

    def __str__(self) -> str:
        """Return the remark on such outputs."""
        kind = "log-probabilities" if self.kind == "log_softmax" else f"probabilities of a {self.kind}"
        return f"its outputs are {kind}, converted back to logits"


class Endings(TorchFunctionMode):
    """Records the arguments and results of the softmaxes and sigmoids of a forward pass.

    Attributes:
        passed: The calls so far: kind, argument, result.
    """

    def __init__(self) -> None:
        self.passed: list[tuple[Kind, Tensor, Tensor]] = []

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        kind = _KINDS.get(getattr(func, "__name__", ""))
        given = args[0] if args else (kwargs or {}).get("input")
        # Attention's softmaxes have more axes, and would fill the memory.
        if kind is not None and isinstance(given, Tensor) and isinstance(output, Tensor) and given.ndim < 3:
            self.passed.append((kind, given, output))
        return output

    def of(self, outputs: Tensor, part: slice = slice(None)) -> Ending | None:
        """Return the last function that outputs went through, among some of the calls; None if there is none.

        Reads values: it waits for the device.
        """
        passed = self.passed[part]
        for number in range(-1, -len(passed) - 1, -1):
            if _are_alike(passed[number][2], outputs):
                return Ending(passed[number][0], number)
        return None

    def given(self, outputs: Tensor, ending: Ending) -> Tensor | None:
        """Return the logits that outputs were computed from, in the same shape, if they are known."""
        if ending.number is not None and len(self.passed) >= -ending.number:
            _, given, result = self.passed[ending.number]
            return given.reshape(outputs.shape) if result.numel() == outputs.numel() else None
        same = [given for _, given, result in self.passed if is_same(result, outputs)]
        return same[-1].reshape(outputs.shape) if same else None


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same, or views of the same values."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.numel() == other.numel())


def _are_alike(result: Tensor, outputs: Tensor) -> bool:
    if is_same(result, outputs) or result.numel() != outputs.numel():
        return result.numel() == outputs.numel()
    result, outputs = (values.detach().reshape(-1).float() for values in (result, outputs))
    return bool(((result - outputs).abs() <= ALIKE).all())


def ending_of(outputs: Float[Tensor, "B N"], takes_probabilities: bool = False) -> Ending | None:
    """Return the function that outputs must have gone through, by their values; None if they may be logits.

    Reads values: it waits for the device.

    Args:
        outputs: The outputs for some images.
        takes_probabilities: Whether a loss computed from them takes probabilities, as ``BCELoss`` does.
    """
    values = outputs.detach().float()
    if not values.numel() or not ((values >= 0) & (values <= 1)).all():
        return None
    rounding = SUMS_TO_ONE * (10 if outputs.dtype in (torch.half, torch.bfloat16) else 1)
    if values.shape[1] > 1 and ((values.sum(1) - 1).abs() < rounding).all():
        return Ending("softmax")
    return Ending("sigmoid") if takes_probabilities else None


def warn_of_probabilities(speaker: str, outputs: Float[Tensor, "B N"], is_first: bool = True) -> None:
    """Warn that a model returns a softmax's probabilities; those on a device are not read.

    Args:
        speaker: Who warns.
        outputs: What is taken for logits.
        is_first: Whether these are the first ones; others are not warned of.
    """
    if is_first and outputs.is_cpu and ending_of(outputs) is not None:
        warnings.warn(
            f"{speaker}: the model returns probabilities (in 0..1, summing to 1 for each image), which are "
            "read as logits here. Return the softmax's input instead, or the logarithm of the probabilities; "
            "SESSCallback does that itself.",
            SESSWarning,
            stacklevel=3,
        )


@contextmanager
def noting(ending: Ending | None) -> Iterator[Endings | None]:
    """Record the arguments of softmaxes and sigmoids in a forward pass, if there is one to undo."""
    if ending is None:
        yield None
        return
    with Endings() as endings:
        yield endings


def to_logits(
    outputs: Float[Tensor, "B N"], ending: Ending | None, endings: Endings | None = None
) -> Float[Tensor, "B N"]:
    """Return logits from which a softmax or sigmoid makes the probabilities that a model returned.

    They are the arguments of the model's own softmax or sigmoid if these were recorded; otherwise logarithms,
    of the odds for a sigmoid. Log-probabilities are logits already.

    Args:
        outputs: What the model returned.
        ending: The function they went through; None for logits.
        endings: The recorded calls of the forward pass that made them.
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
