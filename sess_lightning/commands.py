"""The commands that need the extra ``cli``, each as parser and action; ``cli`` dispatches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, Strategy
from PIL import Image
from torch import nn
from typing_extensions import override

from sess_lightning.callback.callback import SESSCallback
from sess_lightning.cost.measure import Costs, measure_cost
from sess_lightning.evaluation.datasets import Benchmark, BrokenSampleError
from sess_lightning.evaluation.experiment import Experiment
from sess_lightning.evaluation.explanation import explain_image
from sess_lightning.evaluation.results import Results
from sess_lightning.evaluation.runner import evaluate, evaluate_with
from sess_lightning.evaluation.weights import Network, load_network
from sess_lightning.introspection.folding import folded
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.reporting.panels import sheet
from sess_lightning.types import SaliencyMethod


class ExplainedCLI(LightningCLI):
    """Lightning's commands for any module and data module, with a ``SESSCallback`` set by ``--sess.*``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SESSCallback, "sess")

    def _parse_ckpt_path(self) -> None:
        # Lightning would take the checkpoint's hyper-parameters for arguments, which only works if the same
        # command had written it. Here a checkpoint brings weights; --model.* says how the model is made.
        pass


def evaluate_parser() -> ArgumentParser:
    """Return the parser of ``evaluate``."""
    parser = ArgumentParser(prog="sess-lightning evaluate", description=evaluate.__doc__)
    parser.add_argument(
        "--config", action="config", help="YAML with any of these; the paper's: configs/paper"
    )
    parser.add_argument("--data", type=Path, help="the data set's folder, where the config says none")
    parser.add_function_arguments(load_network, "model")
    parser.add_subclass_arguments(Benchmark, "benchmark", required=True)
    parser.add_class_arguments(Experiment, "experiment", skip={"mean", "std"})
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="records and results")
    parser.add_argument(
        "--paper", type=dict[str, float], default={}, help="figures to put beside, percent; s"
    )
    parser.add_argument("--parquet", type=bool | None, default=None, help="also Parquet; null: with pyarrow")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu, ...")
    parser.add_argument("--devices", type=int, default=1, help="processes that share the pictures")
    parser.add_argument("--skip_broken", type=bool, default=True, help="leave out unreadable samples")
    parser.add_argument("--fold", type=bool, default=False, help="fold batch norms away; equal to rounding")
    parser.link_arguments("data", "benchmark.init_args.root")
    return parser


def run_evaluate(arguments: Sequence[str]) -> Results:
    """Evaluate, write the results and print their table."""
    parser = evaluate_parser()
    config = parser.parse_args(arguments)
    made = parser.instantiate(config)
    network = _network(config)
    model = folded(network.model) if config.fold else network.model
    model.to(memory_format=torch.channels_last)
    experiment = replace(made.experiment, mean=network.mean, std=network.std)
    trainer = _trainer(config.accelerator, config.devices)
    given = (model, made.benchmark, experiment, config.out)
    if config.devices > 1:
        results = evaluate_with(trainer, *given, skip_broken=config.skip_broken)
    else:
        model.to(trainer.strategy.root_device)
        results = evaluate(*given, skip_broken=config.skip_broken, progress=True)
    if trainer.is_global_zero:
        written = results.write(config.out, config.paper, config.parquet)
        sys.stdout.write(results.table(config.paper) + "\n")
        sys.stdout.write("".join(f"{path}\n" for path in written))
    return results


def _trainer(accelerator: str, devices: int) -> Trainer:
    # Shares end at different times: the last one is waited for.
    strategy: Strategy | str = DDPStrategy(timeout=timedelta(days=30)) if devices > 1 else "auto"
    return Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _network(config: Namespace) -> Network:
    return load_network(**config.model.as_dict())


def explain_parser() -> ArgumentParser:
    """Return the parser of ``explain``."""
    parser = ArgumentParser(prog="sess-lightning explain", description="Explain one image.")
    parser.add_argument("image", type=Path, help="a file")
    parser.add_argument("--config", action="config", help="YAML with any of these")
    parser.add_function_arguments(load_network, "model")
    parser.add_argument("--method", type=SaliencyMethod, default=SESS(GradCAM()), help="what explains")
    parser.add_argument("--target", type=int | str | None, default=None, help="class; None is the prediction")
    parser.add_argument("--size", type=int, default=224, help="shorter side the model sees, px")
    parser.add_argument("--out", type=Path, default=Path("explanation.png"), help="the image to write")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, ...")
    return parser


def run_explain(arguments: Sequence[str]) -> None:
    """Explain an image, write it with its maps beside, and print what was explained."""
    parser = explain_parser()
    config = parser.parse_args(arguments)
    method = parser.instantiate(config).method
    try:
        explained = explain_image(
            config.image, _network(config), method, config.target, size=config.size, device=config.device
        )
    except (BrokenSampleError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    panel = explained.panel
    config.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet([panel], side=panel.image.shape[0])).save(config.out)
    sys.stdout.write(f"{panel.caption}\n{config.out}\n")


def cost_parser() -> ArgumentParser:
    """Return the parser of ``cost``."""
    parser = ArgumentParser(
        prog="sess-lightning cost",
        description="Measure what explaining costs on a model, against its bare forward.",
    )
    parser.add_argument("--config", action="config", help="YAML with any of these")
    parser.add_function_arguments(load_network, "model")
    parser.set_defaults({"model.name": "resnet50", "model.weights": None})
    parser.add_argument(
        "--module", type=nn.Module | None, default=None, help="your own class, instead of --model.*"
    )
    parser.add_argument(
        "--method", type=SaliencyMethod | None, default=None, help="what explains; null is SESS(GradCAM())"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[224], help="side of the images, or height and width, px"
    )
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    parser.add_argument("--batch", type=int, default=1, help="images explained at once")
    parser.add_argument("--num_samples", type=int, default=32, help="of the callback")
    parser.add_argument("--max_forwards", type=int, default=5000, help="of the callback")
    parser.add_argument("--fold", type=bool, default=False, help="fold batch norms away, for both sides")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is run")
    parser.add_argument("--out", type=Path | None, default=None, help="a CSV to write")
    return parser


def run_cost(arguments: Sequence[str]) -> Costs:
    """Measure on noise, print the table, and write it where asked."""
    parser = cost_parser()
    config = parser.parse_args(arguments)
    if len(config.size) > 2:
        parser.error(f"--size: one side, or height and width, got {config.size}.")
    made = parser.instantiate(config)
    model = made.module if made.module is not None else _network(config).model
    model = folded(model) if config.fold else model
    model = model.to(config.device).to(memory_format=torch.channels_last)
    size = (config.size[0], config.size[-1])
    noise = torch.rand(config.batch, config.channels, *size, generator=torch.Generator().manual_seed(0))
    costs = measure_cost(
        model,
        noise.to(config.device),
        made.method,
        num_samples=config.num_samples,
        max_forwards=config.max_forwards,
        rounds=config.rounds,
    )
    sys.stdout.write(costs.table() + "\n")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        costs.to_csv(config.out)
    return costs
