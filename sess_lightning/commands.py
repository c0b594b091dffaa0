"""The commands that need the extra ``cli``; ``cli`` dispatches, ``arguments`` parses."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, Strategy
from PIL import Image
from torch import nn
from typing_extensions import override

from sess_lightning.arguments import (
    MODE,
    Described,
    cost_parser,
    evaluate_parser,
    explain_parser,
    given_keys,
    spelled_out,
)
from sess_lightning.callback.callback import SESSCallback
from sess_lightning.callback.names import find_class_names, find_normalisation
from sess_lightning.cost.measure import Costs, measure_cost
from sess_lightning.errors import make_folder
from sess_lightning.evaluation.datasets import Benchmark, PictureFolder, read_pixels
from sess_lightning.evaluation.datasets.pictures import find_pictures, is_turned
from sess_lightning.evaluation.experiment import Experiment
from sess_lightning.evaluation.explanation import explain_image
from sess_lightning.evaluation.results import Results
from sess_lightning.evaluation.runner import evaluate, evaluate_with
from sess_lightning.evaluation.sources import first_on_this_machine, own_module
from sess_lightning.evaluation.weights import IMAGENET, Network, is_file, load_network
from sess_lightning.introspection.folding import folded
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import classify
from sess_lightning.introspection.sizes import blank_image, input_window
from sess_lightning.reporting.panels import sheet

SIDE = 224
"""Side of the images where the model states none, px."""
LIGHTNING = """{verb} a module of yours with Lightning, and log how good its explanations are (--sess.*).

examples:
  sess-lightning {command} --config configs/fit.yaml --model my_module.Net --data my_module.Data
  sess-lightning {command} --model my_module.Net --data my_module.Data{more} \\
      --sess.batch_adapter my_module.adapt

Modules in the current folder are found."""
VERBS = {"fit": "Train", "validate": "Validate", "test": "Test", "predict": "Predict with"}


class ExplainedCLI(LightningCLI):
    """Lightning's commands for any module and data module, with a ``SESSCallback`` set by ``--sess.*``."""

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        options = {"parser_mode": MODE, "exit_on_error": False, "formatter_class": Described}
        return super().init_parser(**options | kwargs)

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        more = "" if subcommand == "fit" else " --ckpt_path last.ckpt"
        kwargs["usage"] = f"sess-lightning {subcommand} [options]"
        kwargs["description"] = LIGHTNING.format(verb=VERBS[subcommand], command=subcommand, more=more)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SESSCallback, "sess")

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6 takes the checkpoint's hyper-parameters for arguments, which only works if the same
        # command had written it. Here a checkpoint brings weights; --model.* says how the model is made.
        pass

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks")
        listed = given if isinstance(given, list) else []
        own = {one.state_key for one in listed if isinstance(one, SESSCallback)}
        rest = [one for one in callbacks if not (isinstance(one, SESSCallback) and one.state_key in own)]
        if len(rest) < len(callbacks):
            _note(
                "the SESSCallback under trainer.callbacks is the one that runs; --sess.* options are ignored."
            )
        return super()._instantiate_trainer(config, rest)

    @override
    def before_instantiate_classes(self) -> None:
        path = self.config.get(f"{self.config.get('subcommand')}.ckpt_path")
        if path and Path(path).suffix and "://" not in str(path) and not Path(path).exists():
            raise ArgumentError(None, f"--ckpt_path: {path} is not a file.")


def run_evaluate(arguments: Sequence[str]) -> Results:
    """Evaluate, write the results and print their table."""
    arguments = spelled_out(arguments)
    given = given_keys(arguments)
    parser = evaluate_parser(with_root={"data", "benchmark"} <= given)
    config = parser.parse_args(arguments)
    made = parser.instantiate(config)
    if made.benchmark is None:
        if config.data is None:
            raise ArgumentError(None, "give a folder of images, or a --config that names a benchmark.")
        find_pictures(config.data)  # Before a model is loaded: errors come at once.
    make_folder(config.out)
    network = _network(config)
    experiment = _fitted(made.experiment, network, given)
    benchmark = made.benchmark or _folder(config, network, experiment)
    if not benchmark.is_labelled:
        experiment = replace(experiment, target="predicted")
    model = folded(network.model) if config.fold else network.model
    model.to(memory_format=torch.channels_last)
    trainer = _trainer(config.accelerator, config.devices, config.num_nodes)
    if trainer.world_size > 1:
        results = evaluate_with(
            trainer, model, benchmark, experiment, config.out, skip_broken=config.skip_broken
        )
    else:
        model.to(trainer.strategy.root_device)
        results = evaluate(
            model, benchmark, experiment, config.out, skip_broken=config.skip_broken, progress=True
        )
    if trainer.is_global_zero:
        written = results.write(config.out, config.paper, config.parquet)
        sys.stdout.write(results.table(config.paper) + "\n")
        sys.stdout.write("".join(f"{path}\n" for path in written))
    return results


def _fitted(experiment: Experiment, network: Network, given: set[str]) -> Experiment:
    """Return an experiment whose images are as the model takes them, where no option says otherwise."""
    if "experiment.size" not in given:
        experiment = replace(experiment, size=network.size or input_window(network.model) or SIDE)
    if "experiment.framing" not in given:
        experiment = experiment.framed_for(network.model)
    return replace(experiment, mean=network.mean, std=network.std)


def _folder(config: Namespace, network: Network, experiment: Experiment) -> Benchmark:
    """Return the images of a folder; folders in it are named as the model's classes."""
    with explaining(network.model), torch.no_grad():
        zeros = torch.zeros(1, len(network.mean), experiment.size, experiment.size)
        count = max(2, classify(network.model, zeros).shape[1])
    known = len(network.class_names) == count
    names = network.class_names if known else [f"class {index}" for index in range(count)]
    return PictureFolder(config.data, classes=names)


def _trainer(accelerator: str, devices: int, nodes: int) -> Trainer:
    # Processes finish at different times, and all wait for the last.
    strategy: Strategy | str = DDPStrategy(timeout=timedelta(days=30)) if devices * nodes > 1 else "auto"
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)  # It reports devices, and advertises.
    try:
        return Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        logger.setLevel(level)


def _network(config: Namespace) -> Network:
    """Return the model that the options name; its weights are drawn by ``--seed`` where they are random."""
    torch.manual_seed(config.seed)
    return _per_channel(_named_network(config))


def _named_network(config: Namespace) -> Network:
    options = config.model.as_dict()
    if config.module is not None:
        module = own_module(_plain(config.module), config.checkpoint, config.module_arguments)
        return _own(module, options, sees_images="channels" not in config)  # ``cost`` measures noise.
    if config.checkpoint is not None:
        if options["name"] is None:
            raise ArgumentError(
                None, "--checkpoint: give its class, --module my_module.Net, or --model.name."
            )
        options["weights"] = config.checkpoint
    if options["name"] is None:
        if options["weights"] is not None:
            is_file(options["weights"])  # A wrong path is reported first.
        options["name"] = first_on_this_machine()
        _note(f"{options['name']}, whose ImageNet weights are on this machine; another by --model.name.")
    return load_network(**options)


def _is_grey(model: nn.Module) -> bool:
    """Return whether a model's first convolution takes one channel."""
    return blank_image(model, (1, 1)).shape[1] == 1


def _per_channel(network: Network) -> Network:
    """Return a network of colour images with a mean and a deviation per channel; one value stands for all."""
    if _is_grey(network.model):
        return network
    mean, std = (values * 3 if len(values) == 1 else values for values in (network.mean, network.std))
    return network._replace(mean=mean, std=std)


def _plain(given: Any) -> Any:
    return given.as_dict() if isinstance(given, Namespace) else given


def _own(module: nn.Module, options: dict[str, Any], sees_images: bool) -> Network:
    found = find_normalisation(module)
    if found is None and options["mean"] is None and sees_images:
        _note(
            "images are normalised by ImageNet's mean and std; for others, pass --model.mean and --model.std."
        )
    grey = [(sum(values) / len(values),) for values in IMAGENET]
    mean, std = found or (grey if _is_grey(module) else IMAGENET)
    names = tuple(find_class_names(module) or ())
    size = input_window(module)
    return Network(module, tuple(options["mean"] or mean), tuple(options["std"] or std), names, size)


def _note(text: str) -> None:
    sys.stderr.write(f"sess-lightning: {text}\n")


def run_explain(arguments: Sequence[str]) -> None:
    """Explain an image, write it with its maps beside it, and print what was explained."""
    parser = explain_parser()
    config = parser.parse_args(arguments)
    method = parser.instantiate(config).method
    read_pixels(config.image)  # Before a model is loaded: errors come at once.
    if is_turned(config.image):
        _note(
            f"{config.image} is explained as stored, but viewers rotate it by its EXIF tag; to explain it as "
            "they show it, save the result of PIL.ImageOps.exif_transpose."
        )
    if Image.registered_extensions().get(config.out.suffix.lower()) not in Image.SAVE:
        raise ArgumentError(None, f"--out: {config.out} has no image suffix; end it in .png or .jpg.")
    make_folder(config.out.parent)
    network = _network(config)
    size = (network.size or SIDE) if config.size is None else config.size
    explained = explain_image(config.image, network, method, config.target, size=size, device=config.device)
    panel = explained.panel
    Image.fromarray(sheet([panel], side=max(SIDE, panel.image.shape[0]))).save(config.out)
    number = f"class {explained.target}"
    name = panel.label if panel.label == number else f"{panel.label} ({number})"
    sys.stdout.write(
        f"{config.image}: {name}, probability {explained.probability:.3f}\n"
        f"{' beside '.join(map(str, panel.overlays))}: {config.out}\n"
    )


def run_cost(arguments: Sequence[str]) -> Costs:
    """Measure on noise, print the table, and write it where asked."""
    parser = cost_parser()
    config = parser.parse_args(arguments)
    if len(config.size) > 2:
        raise ArgumentError(None, f"--size: one side, or height and width, got {config.size}.")
    method = parser.instantiate(config).method
    if config.out is not None:
        make_folder(config.out.parent)
    network = _network(config)
    model = folded(network.model) if config.fold else network.model
    model = model.to(config.device).to(memory_format=torch.channels_last)
    sides = config.size or [network.size or SIDE]
    noise = torch.rand(
        config.batch, config.channels, sides[0], sides[-1], generator=torch.Generator().manual_seed(0)
    )
    costs = measure_cost(
        model,
        noise.to(config.device),
        method,
        num_samples=config.num_samples,
        max_forwards=config.max_forwards,
        rounds=config.rounds,
    )
    sys.stdout.write(costs.table() + "\n")
    if config.out is not None:
        costs.to_csv(config.out)
        sys.stdout.write(f"{config.out}\n")
    return costs
