"""States in checkpoints, which another version of this package may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

_Value = TypeVar("_Value")


class Reader:
    """Reads the fields of a state, and notes which of them are odd.

    Args:
        state: The state from a checkpoint.

    Attributes:
        odd: Names of the fields that are missing, unknown or of an unexpected type.
    """

    def __init__(self, state: Any) -> None:
        self._state: Mapping[str, Any] = state if isinstance(state, Mapping) else {}
        self.odd: set[str] = set() if isinstance(state, Mapping) else {"no mapping"}

    def read(self, name: str, kind: type[_Value], default: _Value) -> _Value:
        """Return a field of the expected type, else the default; one that is missing or None is not odd."""
        value = self._state.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.odd.add(name)
            return default
        return value
