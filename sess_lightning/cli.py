"""The command line: ``sess-lightning evaluate | compare | explain | cost | fit | validate | test``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
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
from sess_lightning.engine.fusion import smooth
from sess_lightning.evaluation.comparison import compare
from sess_lightning.evaluation.datasets import Benchmark, Sample, read_picture
from sess_lightning.evaluation.experiment import Experiment
from sess_lightning.evaluation.results import Results
from sess_lightning.evaluation.runner import evaluate, evaluate_with
from sess_lightning.evaluation.weights import Network, load_network
from sess_lightning.introspection.folding import folded
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import classify
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.ops import min_max
from sess_lightning.reporting.panels import Panel, displayed, overlay, sheet
from sess_lightning.types import SaliencyMethod

USAGE = """usage: sess-lightning COMMAND ...

  evaluate   score a method on a data set: the paper's tables, on its data or yours
  compare    draw finished evaluations side by side: ablations
  explain    explain one picture
  cost       measure what explaining costs on a model, and what each knob would change
  fit, validate, test   Lightning's own commands, with the callback beside (--sess.*)

sess-lightning COMMAND --help tells more.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: What stands behind ``sess-lightning``; None reads the command line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else ""
    if command in ("fit", "validate", "test"):
        ExplainedCLI(args=None if arguments is None else given)
    elif command == "evaluate":
        run_evaluate(evaluate_parser().parse_args(given[1:]))
    elif command == "compare":
        asked = compare_parser().parse_args(given[1:])
        sys.stdout.write("".join(f"{path}\n" for path in compare(asked.runs, asked.out, asked.x)))
    elif command == "explain":
        run_explain(explain_parser().parse_args(given[1:]))
    elif command == "cost":
        run_cost(cost_parser().parse_args(given[1:]))
    else:
        sys.stdout.write(USAGE)
        sys.exit(0 if command in ("-h", "--help") else 2)


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
    parser.add_argument("--skip_broken", type=bool, default=False, help="leave out unreadable samples")
    parser.add_argument("--fold", type=bool, default=False, help="fold batch norms away; equal to rounding")
    parser.link_arguments("data", "benchmark.init_args.root")
    return parser


def run_evaluate(config: Namespace) -> Results:
    """Evaluate, write the results and print their table."""
    made = evaluate_parser().instantiate(config)
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


def compare_parser() -> ArgumentParser:
    """Return the parser of ``compare``."""
    parser = ArgumentParser(
        prog="sess-lightning compare", description="Draw finished evaluations side by side."
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of results, or their configs")
    parser.add_argument("--x", type=str | None, default=None, help="option to draw over, e.g. num_scales")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="for compare.csv and .png")
    return parser


def explain_parser() -> ArgumentParser:
    """Return the parser of ``explain``."""
    parser = ArgumentParser(prog="sess-lightning explain", description="Explain one picture.")
    parser.add_argument("image", type=Path, help="a file")
    parser.add_argument("--config", action="config", help="YAML with any of these")
    parser.add_function_arguments(load_network, "model")
    parser.add_argument("--method", type=SaliencyMethod, default=SESS(GradCAM()), help="what explains")
    parser.add_argument("--target", type=int | str | None, default=None, help="class; None is the prediction")
    parser.add_argument("--size", type=int, default=224, help="shorter side the model sees, px")
    parser.add_argument("--out", type=Path, default=Path("explanation.png"), help="the picture to write")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, ...")
    return parser


def run_explain(config: Namespace) -> None:
    """Explain a picture, and its base beside it where there is one."""
    method = explain_parser().instantiate(config).method
    network = _network(config)
    model = network.model.to(config.device)
    with Image.open(config.image) as file:
        size = file.height, file.width
    picture = read_picture(Sample(config.image.stem, config.image, size, ()))
    framing = Experiment(method, size=config.size, antialias=True, mean=network.mean, std=network.std)
    images = framing.images(picture).to(config.device)
    with explaining(model), torch.no_grad():
        logits = classify(model, images.clone())
    target = _target(config.target, network.class_names, int(logits.argmax(1)))
    label = network.class_names[target] if target < len(network.class_names) else f"class {target}"
    targets = torch.tensor([target], device=config.device)
    shown = displayed(images, (network.mean, network.std))[0]
    overlays, caption = {}, [f"target: {label}"]
    for each in [*([method.base] if isinstance(method, SESS) else []), method]:
        maps, scores = each.explain(model, images, targets)
        drawn = min_max(smooth(maps)) if isinstance(each, SESS) else maps
        overlays[type(each).__name__] = overlay(shown, drawn[0])
        caption.append(f"{each}: score {float(scores):.3f}")
    panel = Panel(shown, overlays, "\n".join(caption), label=label, title=config.image.name)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(sheet([panel], side=shown.shape[0]))).save(config.out)
    sys.stdout.write("\n".join([*caption, str(config.out)]) + "\n")


def _target(asked: Any, names: Sequence[str], predicted: int) -> int:
    if asked is None:
        return predicted
    if isinstance(asked, int) or str(asked).isdigit():
        return int(asked)
    if asked not in names:
        raise SystemExit(
            f"--target: {asked!r} is none of the model's {len(names)} class names; give its index."
        )
    return list(names).index(asked)


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


def run_cost(config: Namespace) -> Costs:
    """Measure on noise, print the table, and write it where asked."""
    if len(config.size) > 2:
        raise SystemExit(f"--size: one side, or height and width, got {config.size}.")
    made = cost_parser().instantiate(config)
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


if __name__ == "__main__":
    main()
