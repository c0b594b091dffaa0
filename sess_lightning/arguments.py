"""The options of the commands that need the extra ``cli``, their help, and their errors in one line."""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_dumper, set_loader
from typing_extensions import override

from sess_lightning.evaluation.calls import did_you_mean, method_spec
from sess_lightning.evaluation.comparison import OUT
from sess_lightning.evaluation.datasets import Benchmark
from sess_lightning.evaluation.experiment import Experiment
from sess_lightning.evaluation.sources import LOCAL
from sess_lightning.evaluation.weights import load_network
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.types import SaliencyMethod

CALL = re.compile(r"\s*[A-Za-z_][\w.]*\(")
MODE = "sess"
"""jsonargparse's mode for YAML in which a method may be written as it prints itself."""
METHOD = (
    "the method, as methods print themselves: GradCAM, 'SESS(GuidedBackprop(), num_scales=10)'; "
    "--method.help SESS lists the arguments of one (default: SESS(GradCAM()))"
)
MODEL = {
    "name": "torchvision's name (resnet50), timm/NAME or hf/NAME, a folder or name of Hugging Face (default: "
    "the first of torchvision whose ImageNet weights are on this machine)",
    "weights": "a file (.ckpt, .pth, .pt, .safetensors); DEFAULT, or another name, downloads; null is random "
    "(default: pretrained ones that are on this machine)",
    "layout": "torchray is the Pointing Game's VGG-16 or ResNet-50, from Caffe (default: plain)",
    "num_classes": "outputs of the head (default: what the weights have)",
    "mean": "per channel, of the images it was trained on, in 0..1: [0.5, 0.5, 0.5] (default: the weights', "
    "else ImageNet's)",
    "std": "their standard deviation, likewise",
}
EXPERIMENT = {
    "method": METHOD,
    "compare": "methods to score beside it: '{cam: GradCAM, rise: RISE}' (default: the base of a SESS, a "
    "random map, a centre Gaussian and the base's map, blurred)",
    "target": "explain the label's class, or what the model predicted (default: label, where there are "
    "labels)",
    "size": "side of the images as the model sees them, px (default: the model's, else 224)",
    "framing": "short: resize the shorter side; square: warp; stored: leave images as they are (default: "
    "short, or square for a model that takes nothing else)",
    "antialias": "antialias when images are downsampled (default: false)",
    "curves": "measure insertion and deletion (default: true)",
    "limits": "measure curves on this many images, drawn at random, but pointing on all; by method: "
    "\"{'': 500, random: 100}\", '' is the method itself (default: no limit)",
    "steps": "steps of a curve (default: 28)",
    "tolerance": "of the Pointing Game, px of the stored image (default: 15)",
    "batch_size": "images that pass through the model at once (default: 32)",
    "samples": "take this many images, drawn at random (default: all)",
}
METAVARS = dict.fromkeys(("benchmark", "accelerator"), "NAME") | dict.fromkeys(
    ("devices", "num_nodes", "batch_size", "num_samples", "max_forwards", "num_classes", "steps", "samples"),
    "N",
)
"""Short words for what options take, where their own names would fill the line."""
EVALUATE = """Score a saliency method on a folder of images, or on the data sets of the paper.

examples:
  sess-lightning evaluate photos/
      photos/ holds a folder per class, named as the model's classes or by their indices; or images alone,
      which are explained for what the model predicts; or images and annotations.json in COCO's format,
      whose boxes the Pointing Game needs
  sess-lightning evaluate photos/ --model.name timm/resnet50 --method GradCAM --samples 100
  sess-lightning evaluate --config configs/paper/figure5_resnet50.yaml --data IMAGENET"""
EXPLAIN = """Explain one image: draw the saliency map of a class over it.

examples:
  sess-lightning explain cat.jpg
  sess-lightning explain cat.jpg --target "Egyptian cat" --method "SESS(GradCAM(), num_scales=10)"
  sess-lightning explain cat.jpg --module my_module.Net --checkpoint last.ckpt"""
COST = """Measure what explaining costs on a model, and what it would cost with other options.

examples:
  sess-lightning cost --model.name resnet50 --size 224
  sess-lightning cost --module "my_module.Net(5)" --method GradCAM --device cuda --out costs.csv"""


def load(text: str) -> Any:
    """Load YAML; a method written as a call becomes its class path and arguments."""
    return _methods_read(text if CALL.match(text) else get_loader("yaml")(text))


def _methods_read(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _methods_read(held) for name, held in value.items()}
    if isinstance(value, str) and CALL.match(value):
        try:
            return method_spec(value)
        except ValueError:  # Something else, or wrong: then ``errors.one_line`` says what is.
            pass
    return value


set_loader(MODE, load, (yaml.YAMLError,))
set_dumper(MODE, lambda data: yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


class Described(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of a description as they are, and shows the callback's options without types."""

    @override
    def _get_help_string(self, action: Action) -> str:
        if not action.dest.startswith("sess."):
            return super()._get_help_string(action)
        text = (action.help or "").replace("``", "")
        plain = isinstance(action.default, (bool, int, float, str)) and action.default != SUPPRESS
        return f"{text} (default: {action.default})" if plain else text


class Help(Described):
    """Shows texts written for users as they are, without types."""

    @override
    def _get_help_string(self, action: Action) -> str:
        return action.help or ""

    @override
    def _format_action_invocation(self, action: Action) -> str:
        return super()._format_action_invocation(action).replace("--experiment.", "--")


class Parser(ArgumentParser):
    """A parser that understands methods as they print themselves, and raises its errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args, **{"formatter_class": Help, "parser_mode": MODE, "exit_on_error": False, **kwargs}
        )

    @override
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Any:
        return super().parse_args(args if args is None else _with_arguments(args), *rest, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if found := re.search(r"nrecognized arguments: (-\S+)", message):
            shown = [action for action in self._actions if action.help is not SUPPRESS]
            options = [
                option.replace("--experiment.", "--") for action in shown for option in action.option_strings
            ]
            message = f"there is no option {found[1]}{did_you_mean(found[1].partition('=')[0], options)}"
        super().error(message, ex)

    def describe(self, title: str, texts: Mapping[str, str], prefix: str) -> None:
        """Give a group of options a title and the help in ``texts``, and hide those without."""
        for group in self._action_groups:
            options = [action for action in group._group_actions if f"{action.dest}.".startswith(prefix)]
            for action in options:
                action.help = texts.get(action.dest.removeprefix(prefix), SUPPRESS)
            if options and group not in (self._optionals, self._positionals):
                group.title = title


def _with_arguments(arguments: Sequence[str]) -> list[str]:
    """Gather ``--module.NAME VALUE`` under one option, since the module's class is not known yet."""
    rest, found, texts = [], {}, iter(arguments)
    for text in texts:
        name, equals, value = text.partition("=")
        if name.startswith("--module."):
            name = name.removeprefix("--module.").removeprefix("init_args.")
            found[name] = load(value if equals else next(texts, ""))
        else:
            rest.append(text)
    return [*rest, "--module_arguments", json.dumps(found)] if found else rest


def _parser(command: str, usage: str, about: str) -> Parser:
    name = f"sess-lightning {command}"
    parser = Parser(prog=name, description=about, usage=f"{name} {usage}")
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    return parser


def _add_model(parser: Parser) -> None:
    parser.add_function_arguments(load_network, "model")
    parser.set_defaults({"model.weights": LOCAL})
    parser.describe("the model", MODEL, "model.")
    own = parser.add_argument_group("your own model, instead of --model.name")
    own.add_argument(
        "--module",
        type=str | dict | None,
        default=None,
        help="class or function, also in the current folder: my_module.Net, or 'my_module.Net(5)'; "
        "its arguments also as --module.NAME VALUE",
    )
    own.add_argument("--module_arguments", type=dict, default={}, help=SUPPRESS)
    own.add_argument(
        "--checkpoint",
        type=Path | None,
        default=None,
        help="Lightning's checkpoint of it, whose hyper-parameters are its arguments; or of --model.name",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random, weights too (default: 0)")


def explain_parser() -> Parser:
    """Return the parser of ``explain``."""
    parser = _parser("explain", "IMAGE [options]", EXPLAIN)
    parser.add_argument("image", type=Path, help="the image's file")
    parser.add_argument("--method", type=SaliencyMethod, default=SESS(GradCAM()), help=METHOD)
    parser.add_argument(
        "--target",
        type=int | str | None,
        default=None,
        help="class: a name or an index (default: the predicted)",
    )
    parser.add_argument(
        "--size",
        type=int | None,
        default=None,
        help="shorter side that the model sees, px (default: the model's)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("explanation.png"), help="image to write (default: explanation.png)"
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, ... (default: cpu)")
    _add_model(parser)
    return _tidied(parser)


def evaluate_parser(with_root: bool = True) -> Parser:
    """Return the parser of ``evaluate``.

    Args:
        with_root: Whether ``--data`` is the benchmark's root, which then cannot be given otherwise.
    """
    parser = _parser("evaluate", "[FOLDER] [options]", EVALUATE)
    _add_run(parser)
    parser.add_class_arguments(Experiment, "experiment", skip={"mean", "std"})
    parser.describe("what is measured (in a config, under experiment:)", EXPERIMENT, "experiment.")
    _add_model(parser)
    parser.add_subclass_arguments(Benchmark, "benchmark", required=False)
    text = "VOC07, COCO14, ImageNet or PictureFolder; --benchmark.help VOC07 lists the options of one"
    parser.describe("a data set other than a folder of images", {"": text}, "benchmark")
    if with_root:
        parser.link_arguments("data", "benchmark.init_args.root")
    return _tidied(parser)


def _add_run(parser: Parser) -> None:
    parser.add_argument(
        "--data", type=Path | None, default=None, help="the folder, if it does not come first"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help="folder of the results (default: runs/evaluate)",
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu, ... (default: auto)")
    parser.add_argument("--devices", type=int, default=1, help="processes that share the images (default: 1)")
    parser.add_argument(
        "--num_nodes", type=int, default=1, help="machines that share the images, each with as many processes"
    )
    parser.add_argument(
        "--skip_broken", type=bool, default=True, help="leave out files that cannot be read (default: true)"
    )
    parser.add_argument(
        "--fold",
        type=bool,
        default=False,
        help="fold batch norms away: faster, equal to rounding (default: false)",
    )
    parser.add_argument(
        "--parquet",
        type=bool | None,
        default=None,
        help="also write Parquet (default: if pyarrow is installed)",
    )
    parser.add_argument(
        "--paper",
        type=dict[str, float],
        default={},
        help="percentages to print beside the scores: '{overall: 57.3}'",
    )


def cost_parser() -> Parser:
    """Return the parser of ``cost``."""
    parser = _parser("cost", "[options]", COST)
    parser.add_argument("--method", type=SaliencyMethod | None, default=None, help=METHOD)
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[],
        help="side of the images, or height and width, px (default: the model's)",
    )
    parser.add_argument("--channels", type=int, default=3, help="of the images (default: 3)")
    parser.add_argument("--batch", type=int, default=1, help="images explained at once (default: 1)")
    parser.add_argument("--num_samples", type=int, default=32, help="of the callback (default: 32)")
    parser.add_argument("--max_forwards", type=int, default=5000, help="of the callback (default: 5000)")
    parser.add_argument("--fold", type=bool, default=False, help="fold batch norms away (default: false)")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is run (default: 5)")
    parser.add_argument("--out", type=Path | None, default=None, help="a CSV to write")
    _add_model(parser)
    parser.set_defaults({"model.name": "resnet50", "model.weights": None})
    texts = {
        "name": "torchvision's name, timm/NAME, or hf/NAME, a folder or name of Hugging Face (default: "
        "resnet50)",
        "weights": "a file, or local or DEFAULT for pretrained ones (default: random, which costs the same)",
    }
    parser.describe("the model", MODEL | texts, "model.")
    return _tidied(parser)


def _tidied(parser: Parser) -> Parser:
    """Hide from the help what only writers of configs use; it works all the same."""
    for action in parser._actions:
        action.metavar = METAVARS.get(action.dest.rpartition(".")[2], action.metavar)
        if action.dest.endswith((".help", "print_config")) or action.dest in ("model", "experiment"):
            action.help = SUPPRESS
    return parser


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of ``evaluate`` with their full names: the folder, and those of the experiment."""
    names = {field.name for field in fields(Experiment)} - {"seed"}
    full = ["--data", *arguments] if arguments and not arguments[0].startswith("-") else [*arguments]
    return [
        f"--experiment.{text[2:]}"
        if re.split("[.=]", text[2:])[0] in names and text.startswith("--")
        else text
        for text in full
    ]


def given_keys(arguments: Sequence[str]) -> set[str]:
    """Return the dotted names of what arguments and their configs set."""
    names = {text[2:].partition("=")[0] for text in arguments if text.startswith("--")}
    texts = [text.partition("=")[2] for text in arguments if text.startswith("--config=")]
    texts += [text for option, text in pairwise(arguments) if option == "--config"]
    for path in texts:
        if Path(path).is_file():
            with Path(path).open(encoding="utf-8") as file:  # Errors of YAML then name it.
                names |= {*_dotted(yaml.safe_load(file))}
    return {".".join(name.split(".")[:end]) for name in names for end in (1, 2)}


def _dotted(value: Any, prefix: str = "") -> Iterator[str]:
    for name, held in value.items() if isinstance(value, dict) else ():
        yield prefix + str(name)
        yield from _dotted(held, f"{prefix}{name}.")
