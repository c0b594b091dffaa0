"""Counting forward passes, timing and peak memory: what ``measure`` is made of."""

from __future__ import annotations

import copy
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sess_lightning.ops import wait_for

MOST_RECORDED = 512
"""Images of a part that are kept for its bare forward pass; a part with more is extrapolated from these."""


@dataclass(frozen=True)
class Forwards:
    """What passed through a model.

    Attributes:
        count: Images.
        batches: The first of them, channels last, as they came.
    """

    count: int
    batches: tuple[Tensor, ...]

    @property
    def scale(self) -> float:
        """How many times more images passed than are kept."""
        return self.count / max(1, sum(map(len, self.batches)))


def forwards_of(model: nn.Module, run: Callable[[], object]) -> Forwards:
    """Run something, and return the images that passed through the model.

    At most ``MOST_RECORDED`` images are kept, plus the rest of a batch.
    """
    count, batches = 0, []

    def note(_model: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal count
        if count < MOST_RECORDED:
            held = inputs[0].detach().clone()
            batches.append(held.contiguous(memory_format=torch.channels_last))
        count += len(inputs[0])

    handle = model.register_forward_pre_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return Forwards(count, tuple(batches))


def bare_copy(model: nn.Module) -> nn.Module:
    """Return a copy for the bare forward pass: evaluation mode, channels last."""
    return copy.deepcopy(model).eval().to(memory_format=torch.channels_last)


def bare_forward(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that runs the model on batches and does nothing else."""

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    return run


def alternate(
    runs: Mapping[Any, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Run everything once a round, in alternating order, and return the seconds of each by round.

    A busy machine slows neighbours down alike, so compare within a round and take the median over rounds.
    With a single thread, ``time.process_time`` as ``clock`` leaves out the time of other processes.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in runs if i % 2 == 0 else reversed(runs):
            wait_for(device)
            start = clock()
            runs[name]()
            wait_for(device)
            seconds[name].append(clock() - start)
    return seconds


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the peak bytes of live tensors that ``run`` made.

    On CUDA as the allocator counts them; elsewhere the storages of all tensors that operators return, without
    the memory that a kernel allocates for itself.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveBytes() as live:
        run()
    return int(live.peak)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from the operator that returns them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in _storages((args, kwargs)):
            self._count(given, 0)  # It was there before.
        out = func(*args, **(kwargs or {}))
        for made in _storages(out):
            self._count(made, made.nbytes())
        return out

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return what timings depend on: processor, threads, versions."""
    import torchvision

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
