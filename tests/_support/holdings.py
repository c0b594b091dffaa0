"""What models hold and their forward changes: how it is made, how one forward changes it, how it reads."""

import random
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import CatMetric


class Statistics:
    """A plain object that knows its owner, which knows it."""

    def __init__(self):
        self.count, self.items, self.itself = 0, [torch.zeros(2)], self

    def add(self):
        self.count += 1
        self.items[0].data.add_(1)
        self.items.append(self)


class Slotted:
    __slots__ = ("__hidden", "later", "total")

    def __init__(self):
        self.total, self.__hidden = torch.zeros(2), 0

    def add(self):
        self.__hidden += 1
        self.total.data.add_(1)
        self.later = self.__hidden


@dataclass(frozen=True)
class Frozen:
    count: int = 0
    items: dict = field(default_factory=dict)

    def add(self):
        object.__setattr__(self, "count", self.count + 1)
        self.items[self.count] = self.count


class Marked(list):
    mark = 0


def counting():
    count, calls = 0, []

    def count_up():
        nonlocal count
        count += 1
        calls.append(count)
        count_up.calls = count
        return count

    return count_up


def normalised():
    norm = nn.BatchNorm1d(2)
    norm.register_parameter("still", nn.Parameter(torch.zeros(2), requires_grad=False))
    return norm


def update_norm(norm):
    F.batch_norm(torch.tensor([[1.0, 2], [5, 9]]), norm.running_mean, norm.running_var, training=True)
    norm.still.data = norm.still.data + 1
    norm.weight.data.mul_(2)
    norm.bias.requires_grad_(False)
    norm.num_batches_tracked.data = norm.num_batches_tracked + 1
    norm.register_buffer("late", torch.ones(1))
    norm.register_forward_hook(lambda *_: None)


@torch.enable_grad()
def accumulate(layer):
    layer(torch.ones(1, 2)).sum().backward()


def boxed_layer():
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.ones(1, 2)
    return layer


HOLDINGS = {
    "batch norm on buffers, data and parameters without gradients": (normalised, update_norm),
    "gradients": (boxed_layer, accumulate),
    "a list of tensors": (lambda: [torch.zeros(2), torch.ones(3)[1:]], lambda held: held[1].data.add_(1)),
    "a list": (lambda: [1, 2], lambda held: held.append(len(held))),
    "a list with attributes": (lambda: Marked([0]), lambda held: setattr(held, "mark", held.mark + 1)),
    "nested dicts": (lambda: {"a": {"b": [{"c": torch.zeros(2)}]}},
                     lambda held: held["a"]["b"][0].update(c=held["a"]["b"][0]["c"] + 1, d=[])),
    "a defaultdict": (lambda: defaultdict(list), lambda held: held["a"].append(1)),
    "a Counter": (lambda: Counter("aab"), lambda held: held.update("ab")),
    "an order": (lambda: OrderedDict(a=1, b=2, c=3), lambda held: held.move_to_end(next(iter(held)))),
    "a deque": (lambda: deque([torch.zeros(1), torch.ones(1)], maxlen=2),
                lambda held: held.append(held[0] + held[1] + 1)),
    "a set": (lambda: {1, 2}, lambda held: held.add(len(held) + 1)),
    "bytes": (lambda: bytearray(b"ab"), lambda held: held.extend(b"c")),
    "an array of Python's": (lambda: array("d", [1, 2]), lambda held: held.append(3)),
    "an array": (lambda: np.zeros((2, 2)), lambda held: held.__iadd__(1)),
    "an array of objects": (lambda: np.array([[1], None], dtype=object), lambda held: held[0].append(1)),
    "torch's generator": (lambda: torch.Generator().manual_seed(1),
                          lambda held: torch.rand(2, generator=held)),
    "NumPy's generator": (lambda: np.random.default_rng(1), lambda held: held.normal()),
    "NumPy's old generator": (lambda: np.random.RandomState(1), lambda held: held.normal()),
    "Python's generator": (lambda: random.Random(1), lambda held: held.gauss(0, 1)),
    "a plain object in a cycle": (Statistics, Statistics.add),
    "slots": (Slotted, Slotted.add),
    "a namespace": (lambda: SimpleNamespace(seen=[0]), lambda held: held.seen.append(1)),
    "a frozen dataclass": (Frozen, Frozen.add),
    "a closure": (counting, lambda held: held()),
    "a module in a box": (lambda: [normalised()], lambda held: update_norm(held[0])),
    "a metric": (CatMetric, lambda held: held.update(torch.ones(1))),
    "tensors in a tuple": (lambda: (torch.zeros(2), [torch.zeros(1)]), lambda held: held[1][0].data.add_(1)),
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda held: held._values().add_(1)),
    "a resized tensor": (lambda: torch.zeros(2), lambda held: held.resize_(len(held) + 3).fill_(1)),
}  # fmt: skip


def reading(value, seen=None):
    """Return something that compares by all that a value holds."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        return (*value.shape, value.requires_grad, str(value.detach().to_dense().tolist()))
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if id(value) in seen:
        return f"number {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return str(value.get_state())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, bytearray | array | set):
        return repr(value)
    if isinstance(value, dict):
        return [(str(key), reading(item, seen)) for key, item in value.items()]
    items = (
        [reading(item, seen) for item in value]
        if isinstance(value, list | tuple | deque | np.ndarray)
        else []
    )
    return [*items, *_attributes(value, seen)]


def _attributes(value, seen):
    if callable(value) and getattr(value, "__closure__", None):
        yield [reading(cell.cell_contents, seen) for cell in value.__closure__]
    if isinstance(value, nn.Module):
        yield [reading(parameter.grad, seen) for parameter in value.parameters()]
    yield [
        (name, len(item) if name == "_forward_hooks" else reading(item, seen))  # Torch counts all hooks ever.
        for name, item in getattr(value, "__dict__", {}).items()
        if not isinstance(item, type) and name not in {"update", "compute", "_update_signature"}
    ]
    yield [
        (name, reading(item, seen))
        for name in ("total", "_Slotted__hidden", "later")
        if isinstance(value, Slotted) and (item := getattr(value, name, None)) is not None
    ]
