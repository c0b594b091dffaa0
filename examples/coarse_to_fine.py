"""What scoring fewer windows saves in time, and costs in quality.

    python examples/coarse_to_fine.py --data DIR --out runs/coarse_to_fine.csv

DIR holds images and ``annotations.json`` in COCO's format. Each image is explained for its class with and
without each option of ``SESS``, at pre-filter ratios 0, 0.9 and 0.99, on ImageNet's MobileNetV2 with its
batch norms folded. For each option: processor time relative to a bare forward pass of the same windows, the
share of kept windows that are the same, the change of the map, and the change of overall and of the Pointing
Game with 95 % bootstrap intervals over images, paired with SESS without the option. The run appends to --out
and may be stopped and started again; ``--pictures 0`` only prints the table.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from finetune_imagenet import mobilenet_v2
from sess_lightning.batching import ON_CPU
from sess_lightning.engine.windows import chunked, windows
from sess_lightning.evaluation.datasets import PictureFolder, Sample, read_picture
from sess_lightning.introspection.folding import folded
from sess_lightning.introspection.lending import explaining
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.metrics.bootstrap import Mean, interval, resample
from sess_lightning.metrics.functional import curve_auc, deletion_curve, insertion_curve, pointing_hits

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "coarse to fine, 0.5": {"coarse_to_fine": 0.5},
    "coarse to fine, 0.3": {"coarse_to_fine": 0.3},
}
RATIOS = (0.0, 0.9, 0.99)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/coarse_to_fine.csv"))
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--num-scales", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, data = folded(mobilenet_v2()), PictureFolder(args.data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.pictures].tolist()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["id"] for row in read(args.out)} if args.out.exists() else set()
    for index in order:
        sample = data[index]
        if sample.id not in done:
            append(args.out, measure(model, sample, args.num_scales))
    print(table(read(args.out), args))


def measure(model: nn.Module, sample: Sample, num_scales: int) -> Iterator[dict[str, Any]]:
    """Yield a row per ratio and option."""
    image = ((read_picture(sample) / 255 - MEAN[:, None, None]) / STD[:, None, None])[None]
    trial = sample.trials[0]
    target = torch.tensor([trial.target])
    method = SESS(GradCAM(), num_scales=num_scales)
    plan = method.plan(model, (image.shape[2], image.shape[3]))
    with explaining(model), torch.no_grad():
        parts = list(chunked(windows(image, plan), ON_CPU))
    floor = clocked(lambda: bare(model, parts))[1]
    ends = {}
    for ratio in RATIOS:
        plain: Tensor | None = None
        whole: set[int] = set()
        for name, option in OPTIONS.items():
            variant = replace(method, prefilter_ratio=ratio, **option)
            maps, seconds = clocked(lambda variant=variant: variant(model, image, target))
            plain = maps if plain is None else plain
            with explaining(model):
                kept = {*variant.kept_windows(model, image, target, plan)[0].tolist()}
            whole = whole or kept
            insertion = insertion_curve(model, image, maps, target, ends=ends.get("insertion", (None, None)))
            deletion = deletion_curve(model, image, maps, target, ends=ends.get("deletion", (None, None)))
            ends = {key: (curve[:, 0], curve[:, -1])
                    for key, curve in (("insertion", insertion), ("deletion", deletion))}  # fmt: skip
            yield {
                "id": sample.id,
                "ratio": ratio,
                "option": name,
                "cost": seconds / floor,
                "kept_in_common": len(kept & whole) / len(kept),
                "correlation": float(torch.corrcoef(torch.stack([maps.flatten(), plain.flatten()]))[0, 1]),
                "mean_map_error": float((maps - plain).abs().mean()),
                "insertion": float(curve_auc(insertion)),
                "deletion": float(curve_auc(deletion)),
                "hit": int(pointing_hits(maps, [trial.region])),
            }


def bare(model: nn.Module, parts: list[Tensor]) -> None:
    with torch.no_grad():
        for part in parts:
            model(part)


def clocked(run: Any) -> tuple[Any, float]:
    start = process_time()
    return run(), process_time() - start


def append(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    new, found = not path.exists(), list(rows)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, found[0].keys())
        if new:
            writer.writeheader()
        for row in found:
            writer.writerow({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]], args: argparse.Namespace) -> str:
    """Return a Markdown table: medians of costs, means of the rest, paired differences to no option."""
    pictures = len({row["id"] for row in rows})
    lines = [
        f"{pictures} pictures, MobileNetV2 (folded), n = {args.num_scales}, one thread, "
        f"{platform.machine()}, torch {torch.__version__}, torchvision {torchvision.__version__}",
        "",
        "| r | option | cost / bare forward | kept in common | correlation | mean map error | overall "
        "| change | pointing | change |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ratio in RATIOS:
        chosen = [row for row in rows if float(row["ratio"]) == ratio]
        plain = columns([row for row in chosen if row["option"] == "none"])
        for option in OPTIONS:
            own = columns([row for row in chosen if row["option"] == option])
            changes = [change(own[key] - plain[key]) for key in ("overall", "hit")]
            means = {key: float(values.mean()) for key, values in own.items()}
            lines.append(
                f"| {ratio} | {option} | {statistics.median(own['cost'].tolist()):.2f} | "
                f"{means['kept_in_common']:.2f} | {means['correlation']:.3f} | "
                f"{means['mean_map_error']:.3f} | {means['overall']:.3f} | "
                f"{changes[0]} | {means['hit']:.3f} | {changes[1]} |"
            )
    return "\n".join(lines)


def columns(rows: list[dict[str, str]]) -> dict[str, Tensor]:
    names = [name for name in rows[0] if name not in ("id", "ratio", "option")]
    found = {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in names}
    return found | {"overall": found["insertion"] - found["deletion"]}


def change(difference: Tensor) -> str:
    mean = Mean(difference, torch.arange(len(difference)))
    low, high = interval(resample({"": mean}, len(difference))[""])
    return f"{float(difference.mean()):+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
