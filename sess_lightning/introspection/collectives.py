"""Counting the collectives of a training's processes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import distributed


def collectives() -> int:
    """Return the number of collectives that this process has joined, over all groups; 0 for a single process.

    Groups without a counter are left out.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    groups: Any = getattr(distributed.distributed_c10d, "_world", None)
    total = 0
    for group in list(getattr(groups, "pg_map", ())):
        with suppress(Exception):
            total += group._get_sequence_number_for_group()
    return total
