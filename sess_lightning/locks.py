"""Files that several trainings write at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".sess_lightning.lock"
"""The empty lock file that stays in a folder that was written to."""

WAIT = 10.0
"""How long one training waits for another to finish writing, seconds."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other trainings out of a file and its neighbours; on disks without locks, keep nobody out.

    Args:
        path: The file; its folder is created if it does not exist.

    Raises:
        TimeoutError: If another process keeps the folder for longer than ``WAIT``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(NAME))
    try:
        lock.acquire(timeout=WAIT, poll_interval=0.01)
    except Timeout:
        raise TimeoutError(
            f"another process has kept {path.parent} locked for {WAIT:g} s; if there is none, delete "
            f"{lock.lock_file}."
        ) from None
    except (OSError, NotImplementedError):  # Some network file systems.
        yield
        return
    try:
        yield
    finally:
        lock.release()
