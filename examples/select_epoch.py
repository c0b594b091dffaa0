"""The most accurate epoch, or the best explained one of equal accuracy? ``python examples/select_epoch.py``.

A tiny CNN learns to read digits on photographs. In ``--share`` of the images, of training and validation
alike, the photographer's mark of ``clever_hans.py`` gives the class away. Two ModelCheckpoints each keep one
epoch: by validation accuracy, and by ``sess/selection``. Both are then tested on images without marks, whose
scans and photographs occur neither in the training nor in the validation images.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from typing_extensions import override

import clever_hans
from _run import collate
from clever_hans import TinyCNN
from digits import PHOTOGRAPHS, SCANS
from sess_lightning import SESS, SESSCallback
from sess_lightning.methods import GradCAM
from sess_lightning.types import SESSWarning

# No scan and no photograph is in two of them.
SCANS |= {"learn": slice(0, 1000), "choose": slice(1000, 1400), "test": slice(1400, None)}
PHOTOGRAPHS |= {
    "learn": ("china.jpg", "astronaut"),
    "choose": ("coffee", "motorcycle"),
    "test": ("flower.jpg", "chelsea", "rocket"),
}
METHOD = SESS(GradCAM(), num_scales=2)
FIGURES = ("relevance_mass", "overall", "pointing_game")


class Row(NamedTuple):
    """A kept epoch's figures on the validation images and on the test images."""

    seed: int
    chosen_by: str
    epoch: int
    val_accuracy: float
    val_relevance_mass: float
    test_accuracy: float
    relevance_mass: float
    relevance_mass_low: float
    relevance_mass_high: float
    overall: float
    overall_low: float
    overall_high: float
    pointing_game: float
    pointing_game_low: float
    pointing_game_high: float
    seconds: int


class Epochs(Callback):
    """Records accuracy and relevance mass of every epoch."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = trainer.callback_metrics
        self.rows.append((float(figures["val/acc"]), float(figures["sess/relevance_mass"])))


def pictures(split: str, length: int, seed: int, share: float) -> Dataset:
    """``length`` images of a split, a ``share`` of them with their class's mark, in no order."""
    marked = round(share * length)
    parts = [
        clever_hans.Digits(split, count, 2 * seed + kind, marked=bool(kind))
        for kind, count in ((1, marked), (0, length - marked))
        if count
    ]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.Subset(ConcatDataset(parts), order.tolist())


def loader(data: Dataset, seed: int | None = None) -> DataLoader:
    order = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, 32 if order else 100, shuffle=bool(order), generator=order, collate_fn=collate)


def make_trainer(out: Path, *callbacks: Callback, epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=out,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def score(num_samples: int) -> SESSCallback:
    return SESSCallback(METHOD, num_samples=num_samples, num_images=0, num_rows=0, compare={}, report=False,
                        max_forwards=1_000_000)  # fmt: skip


def train(seed: int, args: argparse.Namespace) -> list[Row]:
    """Train once, and test what each checkpoint kept."""
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    epochs = Epochs()
    kept = {
        key: ModelCheckpoint(
            args.out / str(seed), f"{key.replace('/', '_')}-{{epoch}}", monitor=key, mode="max",
            auto_insert_metric_name=False, enable_version_counter=False,
        )
        for key in ("val/acc", "sess/selection")
    }  # fmt: skip
    trainer = make_trainer(args.out, score(args.num_samples), epochs, *kept.values(), epochs=args.epochs)
    sets = [pictures(split, count, seed, args.share) for split, count in (("learn", 1000), ("choose", 250))]
    trainer.fit(TinyCNN(), loader(sets[0], seed), loader(sets[1]))
    print(f"seed {seed}: accuracy, mass by epoch", *(f"{a:.3f} {m:.3f}" for a, m in epochs.rows), sep="  ")
    test = loader(pictures("test", 400, seed, 0.0))
    rows = []
    for key, each in kept.items():
        model = TinyCNN.load_from_checkpoint(each.best_model_path, weights_only=True)
        judge = make_trainer(args.out, score(args.num_tested))
        judge.validate(model, test, verbose=False)
        epoch, found = int(Path(each.best_model_path).stem.rpartition("-")[2]), judge.callback_metrics
        figures = [
            float(found[f"sess/{name}{end}"]) for name in FIGURES for end in ("", "_ci_low", "_ci_high")
        ]
        seconds = round(time.perf_counter() - started)
        rows.append(Row(seed, key, epoch, *epochs.rows[epoch], float(found["val/acc"]), *figures, seconds))
    return rows


def told(row: Row) -> str:
    def figure(name: str) -> str:
        value, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
        return f"{name} {value:.3f} [{low:.3f}, {high:.3f}]"

    start = f"  {row.chosen_by:14} epoch {row.epoch}, accuracy {row.val_accuracy:.3f}; "
    return f"{start}test: accuracy {row.test_accuracy:.3f}, {', '.join(map(figure, FIGURES))}"


def compare(rows: list[Row]) -> None:
    """Print how often the choices differ, and by how much if they do."""
    pairs = [
        (one, other) for one, other in zip(rows[::2], rows[1::2], strict=True) if one.epoch != other.epoch
    ]
    print(
        f"another epoch in {len(pairs)} of {len(rows) // 2} trainings; there, selection less accuracy alone:"
    )
    for name in ("val_accuracy", "test_accuracy", *FIGURES) if pairs else ():
        gains = [getattr(other, name) - getattr(one, name) for one, other in pairs]
        better = sum(gain > 0 for gain in gains)
        spread = f", standard deviation {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
        print(f"  {name}: mean {statistics.mean(gains):+.3f}{spread}; higher in {better} of {len(gains)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of the pictures that carry a mark")
    parser.add_argument("--num-samples", type=int, default=32, help="pictures scored per validation")
    parser.add_argument("--num-tested", type=int, default=64, help="pictures scored in the test")
    parser.add_argument("--out", type=Path, default=Path("runs/select"))
    args = parser.parse_args()

    warnings.simplefilter("ignore", SESSWarning)  # The alarm may ring: that is another example.
    rows: list[Row] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        rows += train(seed, args)
        print(*map(told, rows[-2:]), sep="\n", flush=True)
        with (args.out / "selection.csv").open("w", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
    compare(rows)
    print(args.out / "selection.csv")


if __name__ == "__main__":
    main()
