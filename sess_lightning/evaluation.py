"""The paper's experiments on a data set: the callback's metric on every picture and class of a benchmark.

What each sample scored is appended to a file as soon as it is known. All figures come from these records
alone, sorted by sample, so that a run killed half-way goes on where it stopped, and several processes give
exactly the figures of one.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, UInt8
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from typing_extensions import override

from sess_lightning.benchmarks import Benchmark, BrokenSampleError, Sample, boxes_to_mask, read_picture
from sess_lightning.engine import scaled_size
from sess_lightning.methods import SESS, Blurred, CentreGaussian, RandomMap
from sess_lightning.metrics import SESSMetric
from sess_lightning.ops import resize, size_of
from sess_lightning.reporting.panels import curve_figure
from sess_lightning.types import SaliencyMethod

FIGURES = ("insertion", "deletion", "overall", "pointing_game", "pointing_game_difficult")
FORMAT = 2
"""Of the records: 2 marks where a new image begins."""
COUNTS = ("n", "images", "broken", "missing", "all_difficult", "skipped", "misclassified", "nan", "flat")


@dataclass(frozen=True)
class Experiment:
    """What is measured, and how pictures reach the model.

    Attributes:
        method: The method to score.
        compare: Methods to score beside it, by name; None is the base of a SESS, and the floors: a random
            map, a centre Gaussian and the base's map, blurred.
        size: Side the model was built for, px.
        framing: ``"short"`` resizes the shorter side to ``size`` and floors the longer one (Pointing Game);
            ``"square"`` warps the picture to a square (insertion and deletion); ``"stored"`` leaves it as is.
        antialias: Antialias when the picture is made smaller; the Pointing Game's literature does not.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.
        curves: Whether to draw insertion and deletion curves.
        steps: Number of steps of a curve.
        tolerance: Of the Pointing Game, px at original resolution.
        batch_size: Images that go through the model at once.
        samples: How many pictures to draw at random; None is all.
        seed: Of the draw.
    """

    method: SaliencyMethod
    compare: dict[str, SaliencyMethod] | None = None
    size: int = 224
    framing: Literal["short", "square", "stored"] = "short"
    antialias: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    curves: bool = True
    steps: int = 28
    tolerance: float = 15.0
    batch_size: int = 32
    samples: int | None = None
    seed: int = 0

    def methods(self) -> dict[str, SaliencyMethod]:
        """Return what is scored beside the method, by name."""
        return dict(self.compare) if self.compare is not None else floors(self.method)

    def metric(self) -> SESSMetric:
        """Return the metric that scores a sample."""
        compare = self.methods()
        limits = {} if self.curves else dict.fromkeys(("", *compare), 0)
        return SESSMetric(
            self.method,
            compare=compare,
            limits=limits,
            steps=self.steps,
            tolerance=self.tolerance,
            batch_size=self.batch_size,
            distributed_available_fn=_never,  # Processes meet in their records, not in collectives.
        )

    def images(self, picture: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "1 3 h w"]:
        """Return a picture as the model takes it."""
        size = size_of(picture)
        if self.framing == "short":
            size = scaled_size(*size, self.size)
        elif self.framing == "square":
            size = self.size, self.size
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return resize(((picture / 255 - mean) / std)[None], size, self.antialias)

    def chosen(self, count: int) -> list[int]:
        """Return the numbers of the pictures to take of ``count``, in rising order."""
        if self.samples is None or self.samples >= count:
            return list(range(count))
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return sorted(drawn[: self.samples].tolist())


def _never() -> bool:
    return False


def floors(method: SaliencyMethod) -> dict[str, SaliencyMethod]:
    """Return what a method's figures are read against."""
    base = method.base if isinstance(method, SESS) else method
    known = {"base": base} if base is not method else {}
    return {
        **known,
        "blurred": Blurred(base),
        "random": RandomMap(activation=method.activation),
        "centre": CentreGaussian(activation=method.activation),
    }


def describe(model: nn.Module, benchmark: Benchmark, experiment: Experiment) -> dict[str, str]:
    """Return what figures depend on, as text: settings, the model's weights, the pictures' names."""
    told = {field.name: repr(getattr(experiment, field.name)) for field in fields(experiment)}
    told["compare"] = repr(experiment.methods())
    told["format"] = str(FORMAT)
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = hashlib.sha256("\n".join(benchmark.ids).encode())
    told["model"] = f"{type(model).__name__} {weights.hexdigest()[:16]}"
    told["benchmark"] = f"{type(benchmark).__name__}, {len(benchmark)} pictures, {names.hexdigest()[:16]}"
    told["benchmark"] += "".join(f", {name}={value}" for name, value in benchmark.options.items())
    return told


def fingerprint(settings: Mapping[str, str]) -> str:
    """Return a short hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An append-only file: a line with the settings, then one per sample. Use it as a context.

    Lines reach the operating system one by one, so a killed process loses at most the one it was writing,
    which is dropped when the file is opened again.

    Args:
        path: The file; made if it is not there.
        settings: What figures depend on.

    Raises:
        ValueError: If the file was written under other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._path, self._settings = path, settings

    def __enter__(self) -> Journal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = _whole_lines(self._path)
        read_journal(self._path, self._settings)
        self._file = self._path.open("ab")
        self._file.truncate(len(whole))
        if not whole:
            self._write({"fingerprint": fingerprint(self._settings), "settings": dict(self._settings)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, sample: int, entry: Mapping[str, Any]) -> None:
        """Write down what a sample scored."""
        self._write({"sample": sample, **entry})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def _whole_lines(path: Path) -> bytes:
    written = path.read_bytes() if path.exists() else b""
    return written[: written.rfind(b"\n") + 1]


def read_journal(path: Path, settings: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """Return what a file holds, by sample; a last line that was cut short is left out.

    Raises:
        ValueError: If the file was written under other settings, or is damaged.
    """
    head, *lines = _whole_lines(path).splitlines() or [b""]
    if not head:
        return {}
    try:
        start, entries = json.loads(head), [json.loads(line) for line in lines]
        found = {entry["sample"]: entry for entry in entries}
        before = start["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); delete it, or use another folder.") from error
    if start["fingerprint"] != fingerprint(settings):
        differing = [key for key in {*before, *settings} if before.get(key) != settings.get(key)]
        told = "; ".join(f"{key} was {before.get(key)}, is {settings.get(key)}" for key in sorted(differing))
        raise ValueError(f"{path}: was written under other settings ({told}); use another folder.")
    return found


def read_journals(folder: Path, settings: Mapping[str, str]) -> dict[int, dict[str, Any]]:
    """Return what all processes wrote, by sample, in rising order."""
    entries: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        entries |= read_journal(path, settings)
    return dict(sorted(entries.items()))


def evaluate(
    model: nn.Module,
    benchmark: Benchmark,
    experiment: Experiment,
    folder: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    skip_broken: bool = False,
    progress: bool = False,
) -> Results:
    """Score a method on a benchmark, going on from the records in ``folder``.

    Args:
        model: Any classifier, on the device to use; given back as it was.
        benchmark: The pictures.
        experiment: What is measured.
        folder: Where the records are; each process writes its own file.
        rank: This process' number: it takes every ``world``-th of the chosen pictures.
        world: How many processes there are.
        skip_broken: Leave out and count samples whose files are missing or damaged.
        progress: Show a bar with rate and time left.

    Raises:
        BrokenSampleError: If a file is missing or damaged, unless such are skipped.
        ValueError: If the folder holds records of other settings.
    """
    folder, settings = Path(folder), describe(model, benchmark, experiment)
    done = read_journals(folder, settings)
    mine = experiment.chosen(len(benchmark))[rank::world]
    left = [number for number in mine if number not in done]
    metric = experiment.metric().to(_device(model))
    bar = tqdm(total=len(mine), initial=len(mine) - len(left), unit="image", disable=not progress)
    with bar, Journal(folder / f"records-{rank}-of-{world}.jsonl", settings) as journal:
        for number in left:
            journal.append(number, _entry(model, benchmark, number, experiment, metric, skip_broken))
            bar.update()
    return summarise(folder, settings, benchmark, experiment)


def evaluate_with(
    trainer: Trainer,
    model: nn.Module,
    benchmark: Benchmark,
    experiment: Experiment,
    folder: str | Path,
    *,
    skip_broken: bool = False,
) -> Results:
    """Score a method on all devices of a Lightning ``Trainer``, each taking its share of the pictures.

    Exactly the figures of ``evaluate``: no picture is padded in, and all come from the same records.
    """
    shard = _Shard(model, (benchmark, experiment, folder), skip_broken)
    trainer.predict(shard, DataLoader(_Once()), return_predictions=False)
    return summarise(folder, describe(model, benchmark, experiment), benchmark, experiment)


class _Once(Dataset[int]):
    """A batch for each process: the pictures are read in the step."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


class _Shard(LightningModule):
    """Runs one process' share in a single predict step."""

    def __init__(
        self, model: nn.Module, given: tuple[Benchmark, Experiment, str | Path], skip_broken: bool
    ) -> None:
        super().__init__()
        self.model, self.given, self.skip_broken = model, given, skip_broken

    @override
    def predict_step(self, batch: Tensor) -> None:
        trainer = self.trainer
        with torch.inference_mode(False):
            evaluate(
                self.model,
                *self.given,
                rank=trainer.global_rank,
                world=trainer.world_size,
                skip_broken=self.skip_broken,
                progress=trainer.is_global_zero,
            )
        trainer.strategy.barrier()


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _entry(
    model: nn.Module,
    benchmark: Benchmark,
    number: int,
    experiment: Experiment,
    metric: SESSMetric,
    skip_broken: bool,
) -> dict[str, Any]:
    name = benchmark.ids[number]
    try:
        sample = benchmark[number]
        picture = read_picture(sample)
    except BrokenSampleError as error:
        if not skip_broken:
            raise
        return {"id": name, "broken": str(error)}
    rows = assess(model, sample, experiment.images(picture), metric) if sample.trials else {}
    return {"id": name, "all_difficult": sample.skipped, "rows": rows}


def assess(
    model: nn.Module, sample: Sample, images: Float[Tensor, "1 3 h w"], metric: SESSMetric
) -> dict[str, list[Any]]:
    """Score a sample's trials, and return the metric's rows as plain lists; None stands for NaN."""
    device = _device(model)
    targets = torch.tensor([trial.target for trial in sample.trials], device=device)
    known = [trial.difficult is not None for trial in sample.trials]
    difficult = torch.tensor([bool(trial.difficult) for trial in sample.trials], device=device)
    metric.update(
        model,
        images.to(device),
        targets,
        _regions(sample, device),
        difficult=difficult if all(known) else None,
        size=sample.size,
    )
    return {name: _without_nan(rows.tolist()) for name, rows in metric.take_rows().items()}


def _regions(
    sample: Sample, device: torch.device
) -> Bool[Tensor, "T H W"] | list[Float[Tensor, "_ 4"]] | None:
    """Return one region per trial, all of one kind; an empty one is no trial."""
    regions = [trial.region for trial in sample.trials]
    if all(region is None for region in regions):
        return None
    given = [torch.zeros(0, 4) if region is None else region for region in regions]
    if any(region.dtype == torch.bool for region in given):
        masks = [r if r.dtype == torch.bool else boxes_to_mask(r, sample.size) for r in given]
        return torch.stack(masks).to(device)
    return [region.to(device) for region in given]


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if value != value else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return float("nan") if value is None else value


def summarise(
    folder: str | Path, settings: Mapping[str, str], benchmark: Benchmark, experiment: Experiment
) -> Results:
    """Compute all figures from the records in ``folder``, whoever wrote them."""
    entries = read_journals(Path(folder), settings)
    metric = experiment.metric()
    rows = [entry["rows"] for entry in entries.values() if entry.get("rows")]
    for each in rows:
        metric.load_rows({name: _with_nan(value) for name, value in each.items()})
    figures = metric.compute() if rows else {}
    expected = experiment.chosen(len(benchmark))
    figures["images"] = float(len(entries))
    figures["broken"] = float(sum("broken" in entry for entry in entries.values()))
    figures["missing"] = float(len(set(expected) - set(entries)))
    figures["all_difficult"] = float(sum(entry.get("all_difficult", 0) for entry in entries.values()))
    return Results(
        method=str(experiment.method),
        others=tuple(experiment.methods()),
        figures=figures,
        curves=metric.curves() if rows else {},
        classes=_per_class(metric, benchmark.class_names, experiment) if rows else [],
        settings=dict(settings),
    )


def _per_class(metric: SESSMetric, names: Sequence[str], experiment: Experiment) -> list[dict[str, Any]]:
    targets = metric.rows("targets")
    table = []
    for target in targets.unique().tolist():
        row: dict[str, Any] = {"class": names[target] if target < len(names) else str(target)}
        for place, name in enumerate(("method", *experiment.methods())):
            hits = metric.rows(f"hits_{place}")[targets == target]
            row |= {"trials": int((hits >= 0).sum()), f"{name}_hits": int((hits == 1).sum())}
        table.append(row)
    return table


@dataclass(frozen=True)
class Results:
    """What came out.

    Attributes:
        method: The method, in words.
        others: Names of the methods beside it.
        figures: As ``SESSMetric.compute`` gives them, and how many images were scored, broken or are missing.
        curves: Mean insertion and deletion curve of each method.
        classes: Pointing Game, trials and hits by class.
        settings: What the figures depend on.
    """

    method: str
    others: tuple[str, ...]
    figures: dict[str, float]
    curves: dict[str, Tensor]
    classes: list[dict[str, Any]]
    settings: dict[str, str]

    def rows(self, paper: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Return a row per method and figure: value, 95 % interval, the paper's value and the difference.

        Args:
            paper: Figures as printed there, in percent; ``base/...`` for the base method's.
        """
        prefixes = {"": self.method} | {f"{name}/": name for name in self.others}
        prefixes |= {f"minus_{name}/": f"{self.method} - {name}" for name in self.others}
        found = [
            _row(self.figures, paper or {}, prefix, label, figure)
            for prefix, label in prefixes.items()
            for figure in (*FIGURES, "insertion_normalised", "deletion_normalised", "flat", "curves_n")
            if prefix + figure in self.figures
        ]
        counts = (*COUNTS, "pointing_game_n", "pointing_game_difficult_n")
        return found + [_row(self.figures, {}, "", "", figure) for figure in counts if figure in self.figures]

    def table(self, paper: Mapping[str, float] | None = None) -> str:
        """Return the figures in percent as text: a line per method, 95 % intervals in brackets."""
        shown = [figure for figure in FIGURES if figure in self.figures]
        lines = [["", *shown]]
        for prefix, label in (("", self.method), *((f"{name}/", name) for name in self.others)):
            lines.append([label, *(_cell(self.figures, prefix + figure) for figure in shown)])
            if any(prefix + figure in (paper or {}) for figure in shown):
                lines.append(["  in the paper", *(_beside(self.figures, paper, prefix + f) for f in shown)])
        for name in self.others:
            paired = (_cell(self.figures, f"minus_{name}/{figure}", signed=True) for figure in shown)
            lines.append([f"less {name}", *paired])
        counts = [f"{name} {self.figures[name]:.0f}" for name in COUNTS if name in self.figures]
        return "\n".join([*_aligned(lines), ", ".join(counts)])

    def write(self, folder: str | Path, paper: Mapping[str, float] | None = None) -> list[Path]:
        """Write ``results.csv`` and ``.txt``, ``classes.csv`` and ``curves.png``; return what was written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "results.csv", folder / "results.txt"]
        _write_csv(written[0], self.rows(paper))
        written[1].write_text(self.table(paper) + "\n")
        if any(row["trials"] for row in self.classes):
            written.append(folder / "classes.csv")
            _write_csv(written[-1], self.classes)
        drawn = {name or self.method: curve for name, curve in self.curves.items() if curve.isfinite().all()}
        if drawn:
            written.append(folder / "curves.png")
            Image.fromarray(curve_figure(drawn)).save(written[-1])
        return written


def _row(
    figures: Mapping[str, float], paper: Mapping[str, float], prefix: str, label: str, figure: str
) -> dict[str, Any]:
    key = prefix + figure
    printed = paper[key] / 100 if key in paper else ""
    return {
        "method": label,
        "figure": figure,
        "value": figures[key],
        "ci_low": figures.get(f"{key}_ci_low", ""),
        "ci_high": figures.get(f"{key}_ci_high", ""),
        "paper": printed,
        "difference": figures[key] - printed if isinstance(printed, float) else "",
    }


def _cell(figures: Mapping[str, float], key: str, signed: bool = False) -> str:
    if key not in figures:
        return "-"
    form = "{:+.2f}" if signed else "{:.2f}"
    ends = [f"{key}_ci_low", f"{key}_ci_high"]
    inside = ", ".join(form.format(100 * figures[end]) for end in ends if end in figures)
    return form.format(100 * figures[key]) + (f" [{inside}]" if inside else "")


def _beside(figures: Mapping[str, float], paper: Mapping[str, float] | None, key: str) -> str:
    if not paper or key not in paper or key not in figures:
        return "-"
    return f"{paper[key]:.1f} ({100 * figures[key] - paper[key]:+.2f})"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
