"""Remote folders: ``s3://``, ``memory://`` and whatever else fsspec knows."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from fnmatch import fnmatch
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from sess_lightning import locks
from sess_lightning.reporting.run import RunReport
from sess_lightning.reporting.sink import Sink


def is_remote(folder: str) -> bool:
    """Return whether only fsspec can write into a folder."""
    return get_protocol(folder) not in ("file", "local")


def local_path(folder: str) -> Path:
    """Return the path of a local folder, which may be given as ``file://``."""
    return Path(url_to_fs(folder)[1]) if "://" in folder else Path(folder)


class RemoteFolder:
    """A local copy of a remote folder, sent back file by file.

    Args:
        url: The folder.
        fetched: Patterns of names; existing files that match one are fetched at once.

    Attributes:
        local: The copy; it lives as long as this object.
    """

    def __init__(self, url: str, *fetched: str) -> None:
        self._files, self._root = url_to_fs(url)
        self.local = Path(tempfile.mkdtemp(prefix="sess-lightning-"))
        weakref.finalize(self, shutil.rmtree, self.local, ignore_errors=True)
        for path in self._files.find(self._root):
            name = path.removeprefix(self._root).lstrip("/")
            if any(fnmatch(name, pattern) for pattern in fetched):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(path, str(self.local / name))
        self._known = self._listed()

    def push(self) -> None:
        """Send the files that have changed since the last time."""
        files = self._listed()
        for name in self._known.keys() - files.keys():
            self._files.rm_file(f"{self._root}/{name}")
            del self._known[name]
        for name, state in files.items():
            if self._known.get(name) != state:
                self._files.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(self.local / name), f"{self._root}/{name}")
                self._known[name] = state

    def _listed(self) -> dict[str, tuple[int, int]]:
        files = [path for path in self.local.rglob("*") if path.is_file() and path.name != locks.NAME]
        states = {path.relative_to(self.local).as_posix(): path.stat() for path in files}
        return {name: (state.st_mtime_ns, state.st_size) for name, state in states.items()}


class RemoteSink(Sink):
    """Lets a sink that writes files write into a remote folder, for one training at a time.

    Args:
        name: Name of the sink.
        folder: The folder that the sink writes into.
        sink: The sink that writes into ``folder.local``.
    """

    def __init__(self, name: str, folder: RemoteFolder, sink: Sink) -> None:
        self.name = name
        self._folder, self._sink = folder, sink

    def write(self, report: RunReport) -> None:
        """Have it written, and send it."""
        self._sink.write(report)
        self._folder.push()

    def close(self, report: RunReport) -> None:
        """Have it written, and send it."""
        self._sink.close(report)
        self._folder.push()
