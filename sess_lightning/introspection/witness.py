"""What a validation step called, and how to call it again on other images.

While the first step runs, hooks see every call that takes images, and which of its outputs a loss or argmax
reads. From then on the same call is replayed, so that what is explained is what was validated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sess_lightning.introspection.calls import calling, hooked, kept_of, without
from sess_lightning.introspection.collectives import collectives
from sess_lightning.introspection.outputs import Step, agreement, fits, is_named, logits_at, outputs, width
from sess_lightning.introspection.probabilities import Ending, is_same, noting, to_logits
from sess_lightning.introspection.readings import (
    LOSSES,
    READINGS,
    Read,
    Readings,
    denies,
    target_classes,
)
from sess_lightning.types import Activation

MOST_CHANNELS = 16
"""The most channels of a tensor that is taken for images, where a batch does not say."""
LEADS_ON = (
    "This was {}, repeated on other images; if it works on validation's batches only, say how images become "
    "logits: SESSCallback(forward=lambda module, images: logits)."
)
"""A note on errors of the model in such a call."""

FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that take no images, and compute differently when one of them has a hook."""


@dataclass(frozen=True)
class Call:
    """How a module is called on images, and which of its outputs are the logits.

    Attributes:
        module: Name of the module within the watched one; empty for the watched one itself.
        leaves: Arguments, flattened, without the images.
        spec: How to unflatten them into (args, kwargs).
        place: Index of the leaf that is the images.
        rows: Indices of the leaves with a row for each image.
        path: The way to the logits in the output.
        text: The call as text.
        doubts: What was assumed; empty if nothing was.
        activation: How the logits become probabilities, according to the loss computed from them.
        turn: Index of the call among the module's calls of this form in one step.
        ending: What the model applies to its logits before it returns them: a softmax or a sigmoid.
        communicates: Whether processes exchanged something during the call.
    """

    module: str
    leaves: tuple[Any, ...]
    spec: Any
    place: int
    rows: tuple[int, ...]
    path: tuple[Step, ...]
    text: str
    doubts: str = ""
    activation: Activation | None = None
    turn: int = 0
    ending: Ending | None = None
    communicates: bool = False

    def is_made_by(self, record: _Record) -> bool:
        """Return whether a record is of this call."""
        return (record.module, record.spec, record.turn) == (self.module, self.spec, self.turn)

    @contextmanager
    def bound(self, root: nn.Module, rows: tuple[Tensor, ...] = ()) -> Iterator[None]:
        """Make ``root(images)`` make this call and return the logits.

        Args:
            root: The module that was watched.
            rows: For each leaf in ``self.rows``, the row of the image that is explained.
        """

        def call(module: nn.Module, images: Tensor) -> Tensor:
            # Copies: tensors from Lightning's inference mode cannot enter autograd.
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
            leaves[self.place] = images
            for leaf, row in zip(self.rows, rows, strict=False):
                leaves[leaf] = row.to(images.device).clone().expand(len(images), *row.shape)
            args, kwargs = tree_unflatten(leaves, self.spec)
            called = module.get_submodule(self.module)
            # The watched module's own forward pass is called as its step calls it: without hooks.
            try:
                with noting(self.ending) as endings:
                    output = called.forward(*args, **kwargs) if not self.module else called(*args, **kwargs)
                    return to_logits(logits_at(output, self.path, len(images)), self.ending, endings)
            except Exception as error:
                error.__notes__ = [LEADS_ON.format(self.text)]
                raise

        with calling(root, call):
            yield

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[Seen]:
        """See the arguments and the logits of this call while a step runs."""
        seen, turns = Seen(), count()
        is_it: list[bool] = []  # For each open call, whether it is this one.

        def before(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            leaves, spec = tree_flatten((args, dict(kwargs)))
            alike = spec == self.spec and _is_images(leaves[self.place])
            is_it.append(alike and next(turns) == self.turn)
            if is_it[-1]:
                kept = kept_of(leaves)
                seen.images, seen.rows = kept[self.place], [kept[leaf] for leaf in self.rows]
                seen.others = without(kept, (self.place, *self.rows))

        def after(output: Any) -> None:
            if is_it and is_it.pop() and output is not None:
                seen.logits = logits_at(output, self.path).detach().clone()

        with ExitStack() as stack:
            hooked(stack, root, self.module, before, after)
            yield seen


@dataclass
class Seen:
    """One step's call.

    Attributes:
        images: The images as the module got them; None before the call.
        rows: The other arguments with a row for each image.
        logits: Its logits.
        others: Its arguments, flattened, without images and rows; empty before the call.
    """

    images: Float[Tensor, "B C H W"] | None = None
    rows: list[Tensor] = field(default_factory=list)
    logits: Float[Tensor, "B N"] | None = None
    others: tuple[Any, ...] = ()


@dataclass
class _Record:
    module: str
    leaves: list[Any]
    spec: Any
    place: int
    depth: int
    turn: int
    is_inner: bool
    passed: tuple[int, int]
    output: Any = None
    exchanged: int = 0


_Candidate = tuple[_Record, tuple[Step, ...], Tensor]
"""A call, and an output of it that may be the logits."""


class Witness:
    """Watches one validation step.

    Args:
        root: The module whose step runs; ``close`` gives it back as it was, whatever happened.
        channels: Of the images; None takes any tensor (B, C, H, W) with few channels.
    """

    def __init__(self, root: nn.Module, channels: int | None = None) -> None:
        self._channels = channels
        self._records: list[_Record] = []
        self._open: list[_Record] = []
        self.reading = Readings(self._open)
        self._stack = ExitStack()
        if is_compiled(root):  # Hooks and modes would cause a recompilation, or would not be seen.
            return
        # Under a hook or a mode, attention leaves its fused path, and validation's last digits change.
        fused = {part for module in root.modules() if isinstance(module, FUSED) for part in module.modules()}
        with ExitStack() as stack:
            for name, module in root.named_modules():
                if not isinstance(module, torch.jit.ScriptModule) and module not in fused:
                    hooked(stack, root, name, partial(self._begin, name), partial(self._end, name))
            if not fused:
                stack.enter_context(self.reading)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Give the module back."""
        self._stack.close()

    def _begin(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves, spec = tree_flatten((args, dict(kwargs)))
        place = next((i for i, leaf in enumerate(leaves) if _is_images(leaf, self._channels)), None)
        if place is None:
            return
        leaves = kept_of(leaves)
        turn = sum(record.module == name and record.spec == spec for record in self._records)
        # Features have another number of channels than the images that a surrounding call was given.
        outer = self._open[0].leaves[self._open[0].place] if self._open else leaves[place]
        is_inner = leaves[place].shape[1] != outer.shape[1]
        passed = len(self.reading.passed)
        record = _Record(name, leaves, spec, place, len(self._open), turn, is_inner, (passed, passed))
        record.exchanged = -collectives()
        self._records.append(record)
        self._open.append(record)

    def _end(self, name: str, output: Any) -> None:
        names = [record.module for record in self._open]
        if name in names:
            while (record := self._open.pop()).module != name:
                pass
            record.output, record.passed = output, (record.passed[0], len(self.reading.passed))
            record.exchanged += collectives()

    def call(self, labels: Tensor | None = None) -> Call | None:
        """Return the call that made the logits; None if no call took images and returned a score per class.

        An output that a loss was computed from is preferred, above all with the labels as its targets, then
        one that classes were read off, then the one that fits the labels best; of several calls that return
        it, the outermost. Labels that fit nothing are ignored: they may be unknown ones, such as 255, or
        count from 1.

        Args:
            labels: Class of each image; None where a batch does not say.
        """
        candidates = self._evident(self._candidates(labels), labels)
        if not candidates:
            return None
        depth = min(record.depth for record, _, _ in candidates)
        candidates = [one for one in candidates if one[0].depth == depth]
        best = max(candidates, key=lambda one: (agreement(one[2], labels), is_named(one[1])))
        equal = {
            path for record, path, logits in candidates
            if record is best[0] and agreement(logits, labels) == agreement(best[2], labels)
        }  # fmt: skip
        return self._made(best, 1 if is_named(best[1]) else len(equal), candidates)

    def _evident(self, found: list[_Candidate], labels: Tensor | None) -> list[_Candidate]:
        """Return the candidates that meet a loss, else a reading, else those as wide as what meets them.

        Where a head is called by itself, of features that another call returned, there is none.
        """
        losses = self.reading.losses
        meant = [loss for loss in losses if labels is not None and _are_same_classes(loss, labels)]
        for evidence in (meant, losses, self.reading.readings):
            read = [one for one in found if any(is_same(one[2], tensor) for _, tensor, _ in evidence)]
            if read:
                return read
        widths = self.widths()
        return [one for one in found if not widths or width(one[2]) in widths]

    def widths(self) -> set[int]:
        """Return how many values an image has where a loss is computed from them, or classes are read off."""
        counts = {len(record.leaves[record.place]) for record in self._records}
        met = (*self.reading.losses, *self.reading.readings)
        return {width(tensor) for _, tensor, _ in met if tensor.ndim and len(tensor) in counts}

    def contradiction(self, call: Call | None, labels: Tensor) -> Tensor | None:
        """Return the targets of the losses computed from a call's logits, if they are not the labels."""
        losses = self._computed_from(call, self.reading.losses)
        given = {_are_same_classes(loss, labels): target_classes(loss) for loss in losses}
        return None if True in given else given.get(False)

    def denies(self, call: Call | None, labels: Tensor, items: Sequence[int]) -> bool:
        """Return whether losses computed from a call's logits have other targets than images' classes."""
        losses = self._computed_from(call, self.reading.losses)
        return {denies(loss, labels, items) for loss in losses} - {None} == {True}

    def regression(self, call: Call | None) -> str:
        """Return the name of a loss for regressions that is computed from a call's logits; else ""."""
        return next((name for name, _, _ in self._computed_from(call, self.reading.regressions)), "")

    def comparison(self, call: Call | None) -> str:
        """Return how a call's outputs are compared with each other where no classes are read off them."""
        if call is None or (seen := self.seen(call).logits) is None or width(seen) in self.widths():
            return ""
        compared = self.reading.comparisons
        return next((name for name, tensor, _ in compared if tensor.shape[1:] == seen.shape[1:]), "")

    def _computed_from(self, call: Call | None, losses: list[Read]) -> list[Read]:
        logits = [logits_at(record.output, call.path) for record in self._made_by(call)] if call else []
        return [loss for loss in losses if any(is_same(one, loss[1]) for one in logits)]

    def _made_by(self, call: Call) -> list[_Record]:
        return [record for record in self._records if record.output is not None and call.is_made_by(record)]

    def _candidates(self, labels: Tensor | None) -> list[_Candidate]:
        for is_inner in (False, True):
            for fitting in (labels, None):
                candidates = [
                    (record, path, logits)
                    for record in self._records if record.is_inner == is_inner
                    for path, logits in outputs(record.output)
                    if fits(logits, len(record.leaves[record.place]), fitting)
                ]  # fmt: skip
                if candidates:
                    return candidates
        return []

    def seen(self, call: Call | None) -> Seen:
        """Return the arguments and the logits of a call, as ``Call.watching`` gives them."""
        if call is None or not (records := self._made_by(call)):
            return Seen()
        leaves, logits = records[0].leaves, logits_at(records[0].output, call.path).detach().clone()
        return Seen(leaves[call.place], [leaves[row] for row in call.rows], logits)

    def _made(self, chosen: _Candidate, equal: int, all_: list[_Candidate]) -> Call:
        record, path, logits = chosen
        count = len(record.leaves[record.place])
        rows = tuple(
            i for i, leaf in enumerate(record.leaves)
            if i != record.place and isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count
        )  # fmt: skip
        leaves = without(record.leaves, (record.place, *rows))
        return Call(
            record.module, leaves, record.spec, record.place, rows, path, _in_words(record, path),
            "; ".join(_doubts(record, path, equal, all_)), self._activation(logits), record.turn,
            self.reading.of(logits, slice(*record.passed)), record.exchanged > 0,
        )  # fmt: skip

    def _activation(self, logits: Tensor) -> Activation | None:
        says = {LOSSES[name] for name, tensor, _ in self.reading.losses if is_same(logits, tensor)}
        read = {READINGS[name] for name, tensor, _ in self.reading.readings if is_same(logits, tensor)}
        says = says or read - {None}
        return says.pop() if len(says) == 1 else None


def _doubts(record: _Record, path: tuple[Step, ...], equal: int, all_: list[_Candidate]) -> Iterator[str]:
    """Yield what is assumed where a call is chosen among others; ``equal`` of its outputs fit as well."""
    if equal > 1:
        yield f"{equal} outputs could be the logits"
    times = sum(other.module == record.module and way == path for other, way, _ in all_)
    if times > 1:
        which = "the first" if record.turn == 0 else f"number {record.turn + 1}"
        yield f"called {times} times in a step, of which {which} is explained"
    others = dict.fromkeys(other.module for other, _, _ in all_ if other.module != record.module)
    if others:
        yield f"{' and '.join(others)} could be meant as well"


def _is_images(leaf: Any, channels: int | None = None) -> bool:
    if not isinstance(leaf, Tensor) or leaf.ndim != 4 or not leaf.is_floating_point():
        return False
    return leaf.shape[1] == channels if channels else leaf.shape[1] <= MOST_CHANNELS


def _are_same_classes(loss: Read, labels: Tensor) -> bool | None:
    """Return whether a loss's targets are the labels; None if they are no classes of these images."""
    targets, classes, count = target_classes(loss), max(2, width(loss[1])), len(labels)
    if targets is None or targets.ndim != 1 or not count or not len(targets) or len(targets) % count:
        return None
    labels = labels.to(targets)
    # Several views of each image, one after the other or all images' first ones first.
    views = [*targets.reshape(-1, count), *targets.reshape(count, -1).T]
    is_class = [(view >= 0) & (view < classes) for view in views]  # Unknown ones may be mapped to -100.
    if loss[2].is_floating_point() and len(labels[labels >= classes].unique()) == 1:
        # Such as 255, where targets have no number for unknown ones.
        is_class = [known & (labels < classes) for known in is_class]
    pairs = zip(views, is_class, strict=True)
    return any(torch.equal(view[known], labels[known]) for view, known in pairs)


def is_compiled(root: nn.Module) -> bool:
    """Return whether a module or a part of it runs compiled."""
    return getattr(root, "_compiler_ctx", None) is not None or any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in root.modules()
    )


def _in_words(record: _Record, path: tuple[Step, ...]) -> str:
    args, kwargs = tree_unflatten(
        ["images" if i == record.place else "..." for i in range(len(record.leaves))], record.spec
    )
    given = [_argument(arg) for arg in args] + [f"{name}={_argument(arg)}" for name, arg in kwargs.items()]
    where = "".join(f"[{key!r}]" if kind == "item" else f".{key}" for kind, key in path)
    name = record.module or "the module"
    return f"{name} called as forward({', '.join(given)})" + (f", logits: output{where}" if where else "")


def _argument(argument: Any) -> str:
    if isinstance(argument, str):
        return argument
    if isinstance(argument, Mapping):
        return "{" + ", ".join(f"{key}: {_argument(value)}" for key, value in argument.items()) + "}"
    return "(" + ", ".join(map(_argument, argument)) + ")" if isinstance(argument, (tuple, list)) else "..."
