"""The suite's run-time checks notice what they are there for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from sess_lightning.ops import min_max
from shapes import checked

check = checked(typechecker=beartype)
ROW, PAIR = torch.zeros(3), torch.zeros(2, 3)


@check
def typed(count: int, names: list[str]) -> str:
    return names[count] if count else 0


@check
def shaped(row: Float[Tensor, " C"], table: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    return table.sum(1) if row.sum() == 0 else row


@check
def counted(count: int) -> Float[Tensor, " {count}"]:
    return ROW


@check
@dataclass
class Record:
    rows: Float[Tensor, "B C"]
    names: "list[str]"


class Summed:
    @check
    @staticmethod
    def static(row: Float[Tensor, " C"]) -> None:
        pass

    @check
    @classmethod
    def made(cls, row: Float[Tensor, " C"]) -> "Missing":  # noqa: F821
        return cls()

    @contextmanager
    @check
    def lent(self, count: int) -> Iterator[int]:
        yield count

    @check
    def each(self, count: int) -> "Iterator[Missing]":  # noqa: F821
        yield count


def outer(made):
    @check
    def inner(row: Float[Tensor, " C"], count: int = 3) -> int:
        return made(inner, count)

    return inner


RIGHT = {
    "types": lambda: typed(1, ["", "name"]),
    "axes": lambda: shaped(ROW, PAIR),
    "an axis of a length given": lambda: counted(3),
    "fields": lambda: Record(PAIR, ["name"]),
    "a static method": lambda: Summed.static(ROW),
    "a class method": lambda: Summed.made(ROW),
    "a context": lambda: Summed().lent(1).__enter__(),
    "a generator": lambda: next(Summed().each(1)),
    "an inner function": lambda: outer(lambda _, count: count)(ROW),
    "one that calls itself": lambda: outer(lambda inner, count: count and inner(ROW, count - 1))(ROW),
}
WRONG = {
    "a type": lambda: typed("1", ["", "name"]),
    "an item": lambda: typed(1, [1]),
    "what returns": lambda: typed(0, ["", "name"]),
    "the number of axes": lambda: shaped(PAIR, PAIR),
    "axes of two lengths": lambda: shaped(torch.zeros(2), PAIR),
    "an axis that returns": lambda: shaped(ROW + 1, PAIR),
    "another length than given": lambda: counted(2),
    "a field's axes": lambda: Record(ROW, ["name"]),
    "a field's type": lambda: Record(PAIR, [1]),
    "a static method's": lambda: Summed.static(PAIR),
    "a class method's": lambda: Summed.made(PAIR),
    "a context's": lambda: Summed().lent("1").__enter__(),
    "a generator's": lambda: next(Summed().each("1")),
    "an inner function's axes": lambda: outer(lambda _, count: count)(PAIR),
    "what an inner function returns": lambda: outer(lambda _, count: "3")(ROW),
    "the package's axes": lambda: min_max(PAIR),
}


@pytest.mark.parametrize("call", RIGHT.values(), ids=RIGHT)
def test_what_annotations_allow_passes(call):
    call()


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_they_do_not_is_an_error(call):
    with pytest.raises(Exception, match=r"violates type hint|Type-check error"):
        call()


def test_they_can_be_turned_off(unchecked):
    assert typed(0, []) == 0
    assert counted(2) is ROW
