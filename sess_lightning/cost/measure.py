"""What explaining costs: measured on the user's model, against bare forward passes of the same images."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.cost.budget import Budget, afford
from sess_lightning.cost.measuring import (
    Forwards,
    alternate,
    bare_copy,
    bare_forward,
    forwards_of,
    machine,
    peak_bytes,
)
from sess_lightning.introspection.logits import check_inputs
from sess_lightning.methods import SESS, CentreGaussian, GradCAM
from sess_lightning.methods.controls import controls
from sess_lightning.metrics import SESSMetric
from sess_lightning.ops import size_of
from sess_lightning.reporting.text import text_table
from sess_lightning.types import SaliencyMethod

SCALES = tuple(range(1, 13))
RATIOS = (0.0, 0.5, 0.9, 0.99)
SHARES = (0.3, 0.5)
SAMPLES = (8, 16, 32, 64, 128)
"""The values of num_scales, prefilter_ratio, coarse_to_fine and num_samples that are estimated."""


@dataclass(frozen=True)
class Part:
    """What one part of a validation run costs for one image.

    Attributes:
        name: What was run.
        forwards: Images that passed through the model, counted by a hook.
        seconds: Median over the rounds.
        bare: Median seconds of a bare forward pass of the same images.
        ratio: Median over the rounds of ``seconds / bare``, both of the same round; NaN without a forward
            pass.
        lowest: The lowest of these ratios.
        highest: The highest.
        peak: Peak bytes of live tensors beyond model and images (CUDA: allocated bytes), for the whole batch.
        bare_peak: The same for the bare forward pass; NaN where it was not run by itself.
    """

    name: str
    forwards: float
    seconds: float
    bare: float
    ratio: float
    lowest: float
    highest: float
    peak: float
    bare_peak: float


@dataclass(frozen=True)
class Knob:
    """What a setting would cost: forward passes are exact, seconds are estimated from the parts.

    Attributes:
        name: The setting, such as ``num_scales=3``; empty for the method as it is.
        forwards: Forward passes for one map.
        seconds: Seconds for one map.
        samples: Samples explained and scored in a validation run; 0 if ``max_forwards`` does not pay for one.
        run_forwards: Forward passes of a validation run of the callback.
        run_seconds: Seconds of a validation run of the callback: samples, base and controls, without logging
            and drawing.
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
        parts: What was measured.
        knobs: The method as it is, then one entry per changed setting.
    """

    setting: Mapping[str, str]
    parts: tuple[Part, ...]
    knobs: tuple[Knob, ...]

    @property
    def run(self) -> Knob:
        """The validation run with the method as it is."""
        return self.knobs[0]

    def table(self) -> str:
        """Return everything as text for a terminal."""
        parts = [
            [p.name, f"{p.forwards:g}", f"{p.seconds:.3g}", f"{p.bare:.3g}",
             f"{p.ratio:.2f} [{p.lowest:.2f}, {p.highest:.2f}]", _mib(p.peak), _mib(p.bare_peak)]
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
        tables = *text_table([heads[0], *parts]), "", *text_table([heads[1], *knobs])
        setting = [f"{name}: {value}" for name, value in self.setting.items()]
        notes = [
            "",
            "Ratios are to bare forward passes of the same images, channels last, in equally large batches.",
            "A run is the callback's: samples, base and controls. Forward passes are exact; the seconds of a",
            "run and of a knob are estimated from the parts. A pre-filter saves no forward pass where scores",
            "and maps come from one (the CAM family); coarse_to_fine does, and may keep other windows.",
        ]
        return "\n".join([*setting, "", *tables, *notes])

    def to_csv(self, path: str | Path) -> None:
        """Write parts and knobs as rows of one file; the first column says which a row is."""
        names = dict.fromkeys(field.name for kind in (Part, Knob) for field in fields(kind))
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["kind", *names, *self.setting])
            writer.writeheader()
            for kind, rows in (("part", self.parts), ("knob", self.knobs)):
                writer.writerows({"kind": kind, **asdict(row), **self.setting} for row in rows)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}" if size == size else "-"


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
    """Measure what a method, its scores and the callback cost on a model, and what other settings would cost.

    Each part alternates with the bare forward pass (a copy of the model in evaluation mode, channels last,
    nothing recorded for gradients) of the very images that the part showed to the model, in batches of the
    same size. The bare seconds of ``SESSMetric.update`` are the sum of those of its parts. A validation run
    is estimated rather than run: its samples times ``SESSMetric.update``, plus the controls' curves.

    Args:
        model: Any classifier, on the images' device; given back as it was. Convolutions are fastest after
            ``model.to(memory_format=torch.channels_last)``.
        images: As the model takes them; forward passes and seconds are reported per image.
        method: What explains; None is ``SESS(GradCAM())``.
        targets: The class to explain on each image; None is class 0.
        num_samples: The callback's argument.
        max_forwards: The callback's argument.
        rounds: How often everything is run, after a first round that is not timed.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_counts(rounds=rounds, num_samples=num_samples)
    method = method if method is not None else SESS(GradCAM())
    if targets is None:
        targets = torch.zeros(len(images), dtype=torch.int64).to(images.device)
    check_inputs("measure_cost", images, targets)
    budget = partial(_budget, model, size_of(images), num_samples=num_samples, max_forwards=max_forwards)
    budget(method)  # Refuses what cannot be afforded before anything is run.
    parts = _measured(model, images, _runs(model, images, method, targets), rounds)
    knobs = tuple(_knobs(model, size_of(images), method, budget, parts))
    return Costs(_setting(model, images, method, rounds), tuple(parts.values()), knobs)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"measure_cost: {name} must be a whole number of at least 1, got {count}.")


def _budget(
    model: nn.Module, size: tuple[int, int], method: SaliencyMethod, *, num_samples: int, max_forwards: int
) -> Budget:
    """Return what the callback would do in a validation run."""
    return afford(
        method, controls(method), model, size, num_samples=num_samples, available=float("inf"),
        max_forwards=max_forwards,
    )  # fmt: skip


def _setting(model: nn.Module, images: Tensor, method: SaliencyMethod, rounds: int) -> dict[str, str]:
    return {
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "images": f"{tuple(images.shape)}, {str(images.dtype).removeprefix('torch.')}",
        "method": str(method),
        "rounds": str(rounds),
        **machine(images.device),
    }


UPDATE, CURVES = "SESSMetric.update", "insertion + deletion"


def _runs(
    model: nn.Module, images: Tensor, method: SaliencyMethod, targets: Tensor
) -> dict[str, Callable[[], object]]:
    base = getattr(method, "base", None)
    # Made once: the image of zeros is scored in the first update only, as in a validation run.
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
    copied = bare_copy(model)
    bare_runs = {name: bare_forward(copied, part.batches) for name, part in seen.items() if name != UPDATE}
    bare_peaks = {name: float(peak_bytes(run, device)) for name, run in bare_runs.items()}
    named = {(name, "bare"): run for name, run in bare_runs.items()}
    timed = alternate({(name, "part"): run for name, run in runs.items()} | named, rounds, device)
    bare = {name: [s * seen[name].scale for s in timed[name, "bare"]] for name in bare_runs}
    bare[UPDATE] = _summed(seen, bare)
    parts = {}
    for name in runs:
        seconds = timed[name, "part"]
        ratios = [s / f if f else float("nan") for s, f in zip(seconds, bare[name], strict=True)]
        parts[name] = Part(
            name=name,
            forwards=seen[name].count / count,
            seconds=median(seconds) / count,
            bare=median(bare[name]) / count,
            ratio=median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
            peak=peaks[name],
            bare_peak=bare_peaks.get(name, float("nan")),
        )
    return parts


def _summed(seen: Mapping[str, Forwards], bare: Mapping[str, list[float]]) -> list[float]:
    """Return the bare seconds of an update: its maps', and for all other passes the curves'."""
    maps = [name for name in bare if name != CURVES]
    others = seen[UPDATE].count - sum(seen[name].count for name in maps)
    return [
        sum(bare[name][i] for name in maps) + others * seconds / seen[CURVES].count
        for i, seconds in enumerate(bare[CURVES])
    ]


def _knobs(
    model: nn.Module,
    size: tuple[int, int],
    method: SaliencyMethod,
    budget: Callable[..., Budget],
    parts: Mapping[str, Part],
) -> Iterator[Knob]:
    measured, curves = parts[str(method)], parts[CURVES]
    blind = sum(control.forwards == 0 for control in controls(method).values())
    further = blind * (curves.forwards - 2) * curves.seconds / curves.forwards
    window, kept = _prices(model, size, method, parts)

    def knob(name: str, other: SaliencyMethod, **options: int) -> Knob:
        seconds = measured.seconds
        if isinstance(other, SESS):
            scored, explained = other.counts(other.plan(model, size))
            seconds = scored * window + explained * kept
        of_sample = parts[UPDATE].seconds - measured.seconds + seconds
        forwards = other.count_forwards(model, size)
        try:
            run = budget(other, **options)
        except ValueError:  # Not even one sample is paid for.
            return Knob(name, forwards, seconds, 0, 0, 0.0)
        run_seconds = run.samples * of_sample + run.controls * further
        return Knob(name, forwards, seconds, run.samples, run.forwards, run_seconds)

    yield knob("", method)
    if isinstance(method, SESS):
        for n in SCALES:
            yield knob(f"num_scales={n}", replace(method, num_scales=n, scales=None))
        for r in RATIOS:
            yield knob(f"prefilter_ratio={r}", replace(method, prefilter_ratio=r))
        for share in SHARES:
            yield knob(f"coarse_to_fine={share}", replace(method, coarse_to_fine=share))
    for n in SAMPLES:
        yield knob(f"num_samples={n}", method, num_samples=n)


def _prices(
    model: nn.Module, size: tuple[int, int], method: SaliencyMethod, parts: Mapping[str, Part]
) -> tuple[float, float]:
    """Return the seconds of scoring a window, and of explaining one that is kept."""
    if not isinstance(method, SESS):
        return 0.0, 0.0
    measured = parts[str(method)]
    count, kept = method.counts(method.plan(model, size))
    if not kept:
        return measured.seconds / count, 0.0
    scored = measured.bare / measured.forwards
    return scored, max(0.0, measured.seconds - count * scored) / kept
