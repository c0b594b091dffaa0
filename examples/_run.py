"""What the training examples share: a classifier, the loggers, one line an epoch, and a closing report."""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

# Column heading -> the key under which Lightning logs it.
COLUMNS = {
    "val acc": "val/acc",
    "SESS overall": "sess/overall",
    "Grad-CAM overall": "sess/base/overall",
    "SESS pointing": "sess/pointing_game",
    "Grad-CAM pointing": "sess/base/pointing_game",
}


class Classifier(LightningModule):
    """Cross-entropy, AdamW and a one-cycle schedule; a subclass brings ``forward``, images to logits."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    @override
    def training_step(self, batch: tuple[Tensor, dict], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = cross_entropy(self(images), targets["labels"])
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, dict], batch_idx: int) -> None:
        images, targets = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == targets["labels"]).float().mean()
        self.log("val/loss", cross_entropy(logits, targets["labels"]), batch_size=len(images))
        self.log("val/acc", accuracy, prog_bar=True, batch_size=len(images))

    @override
    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict]:
    """Stack the images and labels; boxes stay a list, since their number differs from image to image."""
    images, targets = zip(*items, strict=True)
    labels = torch.stack([target["label"] for target in targets])
    return torch.stack(images), {"labels": labels, "boxes": [target["boxes"] for target in targets]}


class EpochTable(Callback):
    """Prints a line after each validation, and keeps the rows; list it after the scoring callback."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._started = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.logged_metrics  # not callback_metrics, which also hold placeholders for monitors
        scores = {name: float(metrics[key]) for name, key in COLUMNS.items() if key in metrics}
        row = {
            "epoch": trainer.current_epoch,
            **scores,
            "seconds": round(time.perf_counter() - self._started),
        }
        self.rows.append(row)
        trainer.print("  ".join(f"{name} {_cell(value)}" for name, value in row.items()))

    def __str__(self) -> str:
        head = list(self.rows[-1]) if self.rows else []
        body = ["  ".join(_cell(row.get(name, "")).rjust(len(name)) for name in head) for row in self.rows]
        return "\n".join(["  ".join(head), *body])


def _cell(value: float | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def add_arguments(parser: argparse.ArgumentParser, *, epochs: int, out: str) -> None:
    """Add the options that the training examples share."""
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--logger", choices=["wandb", "tensorboard", "csv"], default="wandb")
    parser.add_argument("--online", action="store_true", help="send to wandb.ai while training")
    parser.add_argument("--out", type=Path, default=Path(out), help="every run makes its own folder in it")
    parser.add_argument("--num-samples", type=int, default=32, help="pictures scored per validation")
    parser.add_argument("--no-sess", action="store_true", help="train without the callback, to compare")
    parser.add_argument("--seed", type=int, default=0)


def make_trainer(args: argparse.Namespace, callbacks: list[Callback]) -> Trainer:
    """A Trainer that logs to CSV (so its ``log_dir`` is local) and to the chosen logger."""
    local = CSVLogger(args.out, name="")
    folder = Path(local.experiment.log_dir)  # creates it before W&B writes there
    loggers: list[Logger] = [local]
    if args.logger == "wandb":
        loggers.append(WandbLogger(project="sess-lightning", save_dir=folder, offline=not args.online))
    elif args.logger == "tensorboard":
        loggers.append(TensorBoardLogger(args.out, name="", version=local.version))
    return Trainer(
        max_epochs=args.epochs,
        logger=loggers,
        callbacks=callbacks,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )


def report(trainer: Trainer, table: EpochTable) -> None:
    """Print the epochs side by side, draw them, and say where everything is."""
    folder = Path(trainer.log_dir)
    where = [f"Pictures      {folder / 'sess'}"] if (folder / "sess").is_dir() else []
    where += [f"Report        {page}" for page in folder.glob("*/report.html")]
    where += [f"Numbers       {folder / 'metrics.csv'}", f"Plot          {plot_progress(folder)}"]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            where += _close(logger)
        elif isinstance(logger, TensorBoardLogger):
            where.append(f"TensorBoard   tensorboard --logdir {logger.log_dir}")
    print(f"\n{table}\n", *where, sep="\n")


def _close(logger: WandbLogger) -> list[str]:
    run = logger.experiment
    run.finish()
    if not run.offline:
        return [f"W&B           {run.url}"]
    folder = Path(run.dir).parent
    return [f"W&B           {folder}", f"  to upload   wandb sync {folder}"]


def plot_progress(folder: Path) -> Path:
    """Draw a run's ``metrics.csv`` by epoch (accuracy, faithfulness, pointing) into ``progress.png``."""
    from matplotlib.figure import Figure

    panels = {
        "Accuracy": {"validation": "val/acc"},
        "Insertion - deletion": _sides("overall"),
        "Pointing Game": _sides("pointing_game"),
    }
    history = _read(folder / "metrics.csv")
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, key in lines.items():
            if history.get(key):
                axes.plot(*zip(*history[key], strict=True), label=label, **_look(label))
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(folder / "progress.png", dpi=120)
    return folder / "progress.png"


def _sides(score: str) -> dict[str, str]:
    floors = {"random map": f"sess/random/{score}", "centre": f"sess/centre/{score}"}
    return {"SESS": f"sess/{score}", "Grad-CAM": f"sess/base/{score}", **floors}


def _look(label: str) -> dict:
    floor = label in ("random map", "centre")
    return {"ls": ":", "color": "0.6" if label == "centre" else "0.4"} if floor else {"marker": "o"}


def _read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Column of a CSV log -> its (epoch, value) pairs."""
    history: dict[str, list[tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value:
                    history.setdefault(key, []).append((int(row["epoch"]), float(value)))
    return history
