"""What explaining costs: measured on the user's model, against the bare forward of the very same images."""

from __future__ import annotations

import copy
import csv
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from sess_lightning.callback import SESSCallback
from sess_lightning.introspection import check_inputs
from sess_lightning.methods import SESS, CentreGaussian, GradCAM
from sess_lightning.metrics import SESSMetric
from sess_lightning.ops import size_of, wait_for
from sess_lightning.types import SaliencyMethod

SCALES = tuple(range(1, 13))
RATIOS = (0.0, 0.5, 0.9, 0.99)
SHARES = (0.3, 0.5)
SAMPLES = (8, 16, 32, 64, 128)
MOST_RECORDED = 512
"""Images of a part that are kept for its floor; the floor of a part with more is taken in proportion."""


@dataclass(frozen=True)
class Part:
    """What one part of a validation run costs for one image.

    Attributes:
        name: What was run.
        forwards: Images that passed through the model, counted by a hook.
        seconds: Median over the rounds.
        floor: Median seconds of the bare forward of the same images.
        ratio: Median over the rounds of seconds by floor, both of the same round; NaN without a forward.
        lowest: The lowest of these ratios.
        highest: The highest.
        peak: Most bytes of tensors alive at a time beyond model and images (CUDA: allocated bytes), for the
            whole batch.
        floor_peak: The same of the bare forward; NaN where the floor was not run by itself.
    """

    name: str
    forwards: float
    seconds: float
    floor: float
    ratio: float
    lowest: float
    highest: float
    peak: float
    floor_peak: float


@dataclass(frozen=True)
class Knob:
    """What a setting would cost: forwards are exact, seconds estimated from the parts.

    Attributes:
        name: The setting, such as ``num_scales=3``; empty as it is set.
        forwards: Of one map.
        seconds: Of one map.
        samples: Explained and scored in a validation run; 0 if ``max_forwards`` does not pay for one.
        run_forwards: Of a validation run of the callback.
        run_seconds: Of a validation run of the callback: samples, base, floors; not logging and drawing.
    """

    name: str
    forwards: int
    seconds: float
    samples: int
    run_forwards: int
    run_seconds: float


@dataclass(frozen=True)
class Costs:
    """What ``measure_cost`` found.

    Attributes:
        setting: Model, images, method, machine and versions, as text.
        parts: Measured.
        knobs: As it is set first, then what each knob would change.
    """

    setting: Mapping[str, str]
    parts: tuple[Part, ...]
    knobs: tuple[Knob, ...]

    @property
    def run(self) -> Knob:
        """A validation run as it is set."""
        return self.knobs[0]

    def table(self) -> str:
        """Return everything as text for a terminal."""
        parts = [
            [p.name, f"{p.forwards:g}", f"{p.seconds:.3g}", f"{p.floor:.3g}",
             f"{p.ratio:.2f} [{p.lowest:.2f}, {p.highest:.2f}]", _mib(p.peak), _mib(p.floor_peak)]
            for p in self.parts
        ]  # fmt: skip
        knobs = [
            [k.name or "as set", f"{k.forwards:,}", f"{k.seconds:.3g}", str(k.samples),
             f"{k.run_forwards:,}", f"{k.run_seconds:.3g}"]
            for k in self.knobs
        ]  # fmt: skip
        heads = (
            ["of one image", "forwards", "s", "bare forward, s", "ratio [range]", "peak MiB", "bare MiB"],
            ["", "forwards a map", "s a map", "samples", "forwards a run", "s a run"],
        )
        told = [f"{name}: {value}" for name, value in self.setting.items()]
        notes = [
            "",
            "Ratios are to the bare forward of the same images, channels last, in batches as large.",
            "A run is the callback's: samples, base and floors. Forwards are exact, the seconds of a run and",
            "of a knob estimated from the parts. A pre-filter saves no forward where scores and maps come",
            "out of the same one (the CAM family); coarse_to_fine does, and may keep other windows.",
        ]
        return "\n".join([*told, "", *_aligned(heads[0], parts), "", *_aligned(heads[1], knobs), *notes])

    def to_csv(self, path: str | Path) -> None:
        """Write parts and knobs as rows of one file; the first column tells which."""
        names = dict.fromkeys(field.name for kind in (Part, Knob) for field in fields(kind))
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["kind", *names, *self.setting])
            writer.writeheader()
            for kind, rows in (("part", self.parts), ("knob", self.knobs)):
                writer.writerows({"kind": kind, **asdict(row), **self.setting} for row in rows)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}" if size == size else "-"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in (head, *rows))
    ]


def measure_cost(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    method: SaliencyMethod | None = None,
    *,
    targets: Int[Tensor, " B"] | None = None,
    num_samples: int = 32,
    max_forwards: int = 5000,
    rounds: int = 5,
) -> Costs:
    """Measure what a method, its scores and the callback cost on a model, and what the knobs would change.

    Each part runs by turns with its floor: the bare forward (a copy of the model in evaluation mode, channels
    last, nothing recorded for gradients) of the very images that the part showed the model, in batches as
    large. The floor of ``SESSMetric.update`` is summed up from those of its parts. A validation run is not
    run but estimated: its samples times ``SESSMetric.update``, and the curves of the callback's floors.

    Args:
        model: Any classifier, on the images' device; given back as it was. Convolutions are fastest after
            ``model.to(memory_format=torch.channels_last)``.
        images: As the model takes them; forwards and seconds are told per image.
        method: What explains; None is ``SESS(GradCAM())``.
        targets: The class to explain on each image; None is class 0.
        num_samples: Of the callback.
        max_forwards: Of the callback.
        rounds: How often all is run, after a first time that is not timed.

    Raises:
        ValueError: If an argument makes no sense.
    """
    if rounds < 1:
        raise ValueError(f"measure_cost: rounds must be at least 1, got {rounds}.")
    method = method if method is not None else SESS(GradCAM())
    targets = (
        targets if targets is not None else torch.zeros(len(images), dtype=torch.int64).to(images.device)
    )
    check_inputs("measure_cost", images, targets)
    callback = SESSCallback(method, num_samples=num_samples, max_forwards=max_forwards)
    callback.budget(model, size_of(images))  # Is refused before anything is run.
    parts = _measured(model, images, _runs(model, images, method, targets), rounds)
    setting = {
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "images": f"{tuple(images.shape)}, {str(images.dtype).removeprefix('torch.')}",
        "method": str(method),
        "rounds": str(rounds),
        **machine(images.device),
    }
    return Costs(setting, tuple(parts.values()), tuple(_knobs(model, size_of(images), callback, parts)))


UPDATE, CURVES = "SESSMetric.update", "insertion + deletion"


def _runs(
    model: nn.Module, images: Tensor, method: SaliencyMethod, targets: Tensor
) -> dict[str, Callable[[], object]]:
    base = getattr(method, "base", None)
    # Made once: the picture of zeros is scored in the first update only, as in a validation run.
    update = SESSMetric(method).update
    curves = SESSMetric(CentreGaussian(activation=method.activation)).update
    runs: dict[str, Callable[[], object]] = {str(method): lambda: method(model, images, targets)}
    if isinstance(base, SaliencyMethod):
        runs[f"{base}, alone"] = lambda: base(model, images, targets)
    runs[CURVES] = lambda: curves(model, images, targets)
    runs[UPDATE] = lambda: update(model, images, targets)
    return runs


def _measured(
    model: nn.Module, images: Tensor, runs: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Part]:
    """Return every part by name, a batch's figures divided by its images."""
    device, count = images.device, len(images)
    peaks = {name: float(peak_bytes(run, device)) for name, run in runs.items()}  # Finds target layers, too.
    seen = {name: forwards_of(model, run) for name, run in runs.items()}
    bare = bare_copy(model)
    floors = {name: bare_forward(bare, each.batches) for name, each in seen.items() if name != UPDATE}
    floor_peaks = {name: float(peak_bytes(run, device)) for name, run in floors.items()}
    named = {(name, "floor"): run for name, run in floors.items()}
    timed = alternate({(name, "part"): run for name, run in runs.items()} | named, rounds, device)
    floor = {name: [s * seen[name].scale for s in timed[name, "floor"]] for name in floors}
    floor[UPDATE] = _summed(seen, floor)
    parts = {}
    for name in runs:
        seconds = timed[name, "part"]
        ratios = [s / f if f else float("nan") for s, f in zip(seconds, floor[name], strict=True)]
        parts[name] = Part(
            name=name,
            forwards=seen[name].count / count,
            seconds=median(seconds) / count,
            floor=median(floor[name]) / count,
            ratio=median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
            peak=peaks[name],
            floor_peak=floor_peaks.get(name, float("nan")),
        )
    return parts


def _summed(seen: Mapping[str, Forwards], floors: Mapping[str, list[float]]) -> list[float]:
    """Return the floor of an update: its maps', and for every other forward that of a perturbed image."""
    maps = [name for name in floors if name != CURVES]
    others = seen[UPDATE].count - sum(seen[name].count for name in maps)
    return [
        sum(floors[name][i] for name in maps) + others * each / seen[CURVES].count
        for i, each in enumerate(floors[CURVES])
    ]


def _knobs(
    model: nn.Module, size: tuple[int, int], callback: SESSCallback, parts: Mapping[str, Part]
) -> Iterator[Knob]:
    method, compare = callback.methods(model)
    told, curves = parts[str(method)], parts[CURVES]
    floors = sum(each.forwards == 0 for each in compare.values())
    further = floors * (curves.forwards - 2) * curves.seconds / curves.forwards
    window, kept = _prices(model, size, method, parts)

    def knob(name: str, asked: SESSCallback) -> Knob:
        other = asked.methods(model)[0]
        seconds = told.seconds
        if isinstance(other, SESS):
            count, some = other.counts(other.plan(model, size))
            seconds = count * window + some * kept
        each = parts[UPDATE].seconds - told.seconds + seconds
        forwards = other.count_forwards(model, size)
        try:
            budget = asked.budget(model, size)
        except ValueError:  # Not even one sample is paid for.
            return Knob(name, forwards, seconds, 0, 0, 0.0)
        run = budget.samples * each + budget.floors * further
        return Knob(name, forwards, seconds, budget.samples, budget.forwards, run)

    def having(method: SaliencyMethod, num_samples: int = callback.num_samples) -> SESSCallback:
        return SESSCallback(method, num_samples=num_samples, max_forwards=callback.max_forwards)

    yield knob("", callback)
    if isinstance(method, SESS):
        for n in SCALES:
            yield knob(f"num_scales={n}", having(replace(method, num_scales=n, scales=None)))
        for r in RATIOS:
            yield knob(f"prefilter_ratio={r}", having(replace(method, prefilter_ratio=r)))
        if method.scoring == "full" and method.scoring_size is None:
            for share in SHARES:
                yield knob(f"coarse_to_fine={share}", having(replace(method, coarse_to_fine=share)))
    for n in SAMPLES:
        yield knob(f"num_samples={n}", having(method, n))


def _prices(
    model: nn.Module, size: tuple[int, int], method: SaliencyMethod, parts: Mapping[str, Part]
) -> tuple[float, float]:
    """Return the seconds of scoring a window, and of explaining one that is kept."""
    if not isinstance(method, SESS):
        return 0.0, 0.0
    told = parts[str(method)]
    plan = method.plan(model, size)
    count, kept = method.counts(plan)
    if not kept:
        return told.seconds / count, 0.0
    if method.base.single_forward:  # Cheap scores: what was kept cost what the base costs on a window.
        share = plan.window**2 / (size[0] * size[1])
        explained = parts[f"{method.base}, alone"].seconds * share
        return max(0.0, told.seconds - kept * explained) / count, explained
    scored = told.floor / told.forwards
    return scored, max(0.0, told.seconds - count * scored) / kept


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
        """How many times more images there were than are held."""
        return self.count / max(1, sum(map(len, self.batches)))


def forwards_of(model: nn.Module, run: Callable[[], object]) -> Forwards:
    """Run something, and return what it showed to the model.

    At most ``MOST_RECORDED`` images are held, and one batch more.
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
    """Return a copy that gives the floor: evaluation mode, channels last."""
    return copy.deepcopy(model).eval().to(memory_format=torch.channels_last)


def bare_forward(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], None]:
    """Return what runs the model on batches and does nothing else."""

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
    """Run everything once a round, to and fro, and return the seconds each took by round.

    What a busy machine does to one it does to its neighbour: compare within a round, take the median over
    rounds. With a single thread, ``time.process_time`` as ``clock`` leaves out what other processes take.
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
    """Return the most bytes that tensors made by ``run`` take at a time.

    On CUDA as the allocator counts them, else the storages of all tensors that operators return; what a
    kernel allocates for itself is not seen there.
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
    """Counts the bytes of storages from the operator that returns them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in _storages((args, kwargs)):
            self._count(given, 0)  # Was there before.
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
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
