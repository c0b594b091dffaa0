"""The paper's experiments on a data set: the callback's metric on every image and class of a benchmark.

Each sample's scores are appended to a file as soon as they are known. All figures come from these records
alone, sorted by sample, so that a run that was killed continues where it stopped, and several processes give
exactly the figures of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from typing_extensions import override

from sess_lightning.evaluation.datasets import (
    Benchmark,
    BrokenSampleError,
    Sample,
    Trial,
    boxes_to_mask,
    read_picture,
)
from sess_lightning.evaluation.experiment import FORMAT, Experiment
from sess_lightning.evaluation.journal import Journal, read_journals
from sess_lightning.evaluation.results import Results, over_images, per_class, per_sample
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import classify, predict
from sess_lightning.jsonl import plain
from sess_lightning.metrics import SESSMetric
from sess_lightning.metrics.summary import Rows, mean_curves, scores


def describe(model: nn.Module, benchmark: Benchmark, experiment: Experiment) -> dict[str, str]:
    """Return what the figures depend on, as text: settings, the model's weights, the images' names.

    Raises:
        ValueError: If labels are to be explained and there are none.
    """
    if not benchmark.is_labelled and experiment.target == "label":
        raise ValueError('evaluate: the images have no labels; explain predictions, target="predicted".')
    settings = {field.name: repr(getattr(experiment, field.name)) for field in fields(experiment)}
    if experiment.limits is None:
        del settings["limits"]  # Records from before there were limits are still read.
    settings["compare"] = repr(experiment.methods())
    settings["format"] = str(FORMAT)
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    names = hashlib.sha256("\n".join(benchmark.ids).encode())
    settings["model"] = f"{type(model).__name__} {weights.hexdigest()[:16]}"
    settings["benchmark"] = f"{type(benchmark).__name__}, {len(benchmark)} pictures, {names.hexdigest()[:16]}"
    settings["benchmark"] += "".join(f", {name}={value}" for name, value in benchmark.options.items())
    return settings


def evaluate(
    model: nn.Module,
    benchmark: Benchmark,
    experiment: Experiment,
    folder: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    skip_broken: bool = True,
    progress: bool = False,
) -> Results:
    """Score a method on a benchmark, continuing from the records in ``folder``.

    Args:
        model: Any classifier, on the device to use; given back as it was.
        benchmark: The images.
        experiment: What is measured.
        folder: Folder of the records; each process writes its own file.
        rank: This process's number, of ``world``: it takes every ``world``-th of the chosen images.
        world: Number of processes.
        skip_broken: Leave out and count missing or damaged files; a continued run tries them again.
        progress: Show a progress bar.

    Raises:
        BrokenSampleError: If a file cannot be read and is not skipped, or if none can.
        ValueError: If the folder's records have other settings, or labels are asked for and there are none.
    """
    folder, settings = Path(folder), describe(model, benchmark, experiment)
    done = read_journals(folder, settings)
    mine = experiment.chosen(len(benchmark))[rank::world]
    left = [number for number in mine if "broken" in done.get(number, {"broken": ""})]
    metric = experiment.metric().to(_device(model))
    journal = Journal(folder / f"records-{rank}-of-{world}.jsonl", settings)
    without = experiment.without_curves(len(benchmark))
    with tqdm(mine, initial=len(mine) - len(left), unit="image", disable=not progress) as bar:
        for number in left:
            metric.limits = without[number]
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
    skip_broken: bool = True,
) -> Results:
    """Score a method on all devices of a Lightning ``Trainer``, each with its share of the images.

    The figures are exactly those of ``evaluate``: no image is repeated as padding, and all come from the same
    records.
    """
    shard = _Shard(model, (benchmark, experiment, folder), skip_broken)
    trainer.predict(shard, DataLoader(_Once()), return_predictions=False)
    return summarise(folder, describe(model, benchmark, experiment), benchmark, experiment)


class _Once(Dataset[int]):
    """One batch for each process: the images are read in the step."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


class _Shard(LightningModule):
    """Runs one process's share in a single predict step."""

    def __init__(
        self, model: nn.Module, given: tuple[Benchmark, Experiment, str | Path], skip_broken: bool
    ) -> None:
        super().__init__()
        self.model, self.given, self.skip_broken = model, given, skip_broken

    @override
    def predict_step(self, batch: Tensor) -> Tensor:
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
        return batch  # Lightning warns of steps that return nothing.


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
    entry: dict[str, Any] = {"id": name, "all_difficult": sample.skipped}
    if not sample.trials and benchmark.is_labelled:
        return entry
    images = experiment.images(picture).to(_device(model))
    if experiment.target == "predicted":
        labels = [trial.target for trial in sample.trials]
        sample = as_predicted(sample, model, images)
        entry["misclassified"] = int(benchmark.is_labelled and sample.trials[0].target not in labels)
    entry["rows"] = assess(model, sample, images, metric)
    entry["seconds"] = {method: round(scored.seconds, 6) for method, scored in metric.latest.items()}
    return entry


def as_predicted(sample: Sample, model: nn.Module, images: Float[Tensor, "1 C h w"]) -> Sample:
    """Return a sample whose only trial is the predicted class, with its region if a label agrees."""
    with explaining(model), torch.no_grad():
        predicted = int(predict(classify(model, images.clone())))
    agreeing = [trial for trial in sample.trials if trial.target == predicted]
    return sample._replace(trials=tuple(agreeing) or (Trial(predicted, None, None),))


def assess(
    model: nn.Module, sample: Sample, images: Float[Tensor, "1 C h w"], metric: SESSMetric
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
    return {name: plain(rows) for name, rows in metric.take_rows().items()}


def _regions(
    sample: Sample, device: torch.device
) -> Bool[Tensor, "T H W"] | list[Float[Tensor, "_ 4"]] | None:
    """Return one region per trial, all of one kind; an empty one counts as no trial."""
    regions = [trial.region for trial in sample.trials]
    if all(region is None for region in regions):
        return None
    given = [torch.zeros(0, 4) if region is None else region for region in regions]
    if any(region.dtype == torch.bool for region in given):
        masks = [r if r.dtype == torch.bool else boxes_to_mask(r, sample.size) for r in given]
        return torch.stack(masks).to(device)
    return [region.to(device) for region in given]


def summarise(
    folder: str | Path, settings: Mapping[str, str], benchmark: Benchmark, experiment: Experiment
) -> Results:
    """Compute all figures from the records in ``folder``, whichever process wrote them.

    Raises:
        BrokenSampleError: If no image can be read.
        ValueError: If no image has a class to explain.
    """
    entries = read_journals(Path(folder), settings)
    chosen = experiment.chosen(len(benchmark))
    broken = [entry["broken"] for entry in entries.values() if "broken" in entry]
    if broken and len(broken) == len(chosen):
        raise BrokenSampleError(f"None of the {len(chosen)} images can be read; the first: {broken[0]}")
    metric = experiment.metric()
    scored = {number: entry for number, entry in entries.items() if entry.get("rows")}
    if entries and not scored and len(entries) == len(chosen):
        raise ValueError(
            f"None of the {len(chosen)} images has a class to explain. Give each an annotation or a class "
            "folder; for images alone, the predicted class is explained."
        )
    for entry in scored.values():
        metric.load_rows(entry["rows"])
    rows, others = metric.gather(), tuple(experiment.methods())
    names = [*metric.methods]
    figures = _figures(rows, names, entries, benchmark, experiment)
    classes = benchmark.class_names
    return Results(
        method=str(experiment.method),
        others=others,
        figures=figures,
        curves=mean_curves(rows, names) if scored else {},
        classes=per_class(rows, classes, others),
        samples=per_sample(rows, classes, others, scored) if scored else {},
        seconds=_mean_seconds(scored.values()),
        settings=dict(settings),
    )


def _figures(
    rows: Rows,
    names: Sequence[str],
    entries: Mapping[int, Mapping[str, Any]],
    benchmark: Benchmark,
    experiment: Experiment,
) -> dict[str, float]:
    """Return all scores and counts."""
    figures = scores(rows, names) | over_images(rows, names)
    if experiment.target == "predicted":
        figures["misclassified"] = _total(entries, "misclassified")
    if not benchmark.is_labelled:  # What was predicted is what was explained.
        figures.pop("misclassified", None)
    figures["images"] = float(len(entries))
    figures["broken"] = float(sum("broken" in entry for entry in entries.values()))
    figures["missing"] = float(len(set(experiment.chosen(len(benchmark))) - set(entries)))
    figures["all_difficult"] = _total(entries, "all_difficult")
    return figures


def _total(entries: Mapping[int, Mapping[str, Any]], count: str) -> float:
    return float(sum(entry.get(count, 0) for entry in entries.values()))


def _mean_seconds(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    taken = [entry["seconds"] for entry in entries]
    return {name: sum(row[name] for row in taken) / len(taken) for name in (taken[0] if taken else ())}
