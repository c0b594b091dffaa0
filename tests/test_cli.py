import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from formula import build
from layouts import photograph, write_coco, write_imagenet, write_own, write_voc
from lightning_models import fit, validate
from sess_lightning import cli, commands
from sess_lightning.evaluation import weights
from sess_lightning.evaluation.weights import fit_names, load_network, read_state
from sess_lightning.introspection import Grid, OnGrid
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.types import SaliencyMethod

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "paper").glob("*.yaml"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("data")
    return {"VOC07": write_voc(root / "voc"), "COCO14": write_coco(root / "coco"),
            "ImageNet": write_imagenet(root / "imagenet")}  # fmt: skip


@pytest.fixture
def parser():
    return commands.evaluate_parser()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_paper_makes_an_experiment(path, roots, parser):
    text = path.read_text()
    kind = next(name for name in roots if f"datasets.{name}" in text)
    more = ["--data", str(roots[kind])]
    if kind == "ImageNet":
        more = ["--data", str(roots[kind] / "val"), "--benchmark.synsets", str(roots[kind] / "synsets.txt")]
    made = parser.instantiate(parser.parse_args(["--config", str(path), *more]))
    experiment = made.experiment
    assert len(made.benchmark) == 3
    assert isinstance(experiment.method, SaliencyMethod)
    assert experiment.metric().methods.keys() == {"", *experiment.methods()}
    assert str(made.out) == f"runs/paper/{path.stem}"
    if isinstance(experiment.method, SESS):
        assert not experiment.method.smoothing
        assert not experiment.method.antialias


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sess-lightning"])  # Or Lightning wonders about pytest's arguments.


def test_there_is_a_config_for_every_row():
    names = {path.stem for path in CONFIGS}
    backbones, methods = ("resnet50", "vgg16"), ("gradcam", "guidedbp", "groupcam")
    assert {f"table1_{b}_{m}" for b in backbones for m in methods} <= names
    others = (*methods, "rise", "ebp", "ep")
    assert {f"table3_{d}_{b}_{m}" for d in ("voc07", "coco14") for b in backbones for m in others} <= names
    assert {f"table2_{m}_n{n}_r{r}" for m in methods for n in (6, 12) for r in (0, 50, 99)} <= names
    assert {f"figure{f}_{b}" for f in (5, 6, 7, 9, 10) for b in backbones} <= names


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
@pytest.mark.parametrize(
    ("figure", "option", "values"),
    [(5, "num_scales", range(1, 13)), (6, "prefilter_ratio", [r / 10 for r in range(10)])],
    ids=["figure5", "figure6"],
)
def test_an_ablation_is_one_config_and_a_loop_over_one_option(
    figure, option, values, backbone, roots, parser
):
    path = CONFIGS[0].with_name(f"figure{figure}_{backbone}.yaml")
    assert f"--experiment.method.{option} $" in path.read_text()
    data = [
        "--data",
        str(roots["ImageNet"] / "val"),
        "--benchmark.synsets",
        str(roots["ImageNet"] / "synsets.txt"),
    ]
    for value in values:
        more = [f"--experiment.method.{option}", str(value), "--out", f"runs/{value}"]
        made = parser.instantiate(parser.parse_args(["--config", str(path), *data, *more]))
        assert getattr(made.experiment.method, option) == value
        assert str(made.out) == f"runs/{value}"


@pytest.fixture
def tiny_network(monkeypatch):
    """The tiny CNN, in place of torchvision's."""
    network = weights.Network(build("tiny"), (0.5,) * 3, (0.5,) * 3, ("a", "b", "c", "d", "e"))
    monkeypatch.setattr(commands, "_network", lambda config: network)
    return network


def write_config(path):
    path.write_text(
        """
model: {name: resnet18, weights: null}
benchmark: {class_path: sess_lightning.evaluation.datasets.PictureFolder}
experiment:
  method:
    class_path: sess_lightning.methods.SESS
    init_args: {base: {class_path: sess_lightning.methods.GradCAM}, num_scales: 2, window: 64}
  size: 64
  steps: 2
paper: {overall: 57.3}
"""
    )
    return str(path)


def test_evaluate_writes_and_prints_the_figures(tmp_path, capsys, tiny_network):
    root, config = write_own(tmp_path / "own"), write_config(tmp_path / "tiny.yaml")
    given = ["evaluate", "--config", config, "--data", str(root), "--out", str(tmp_path / "out")]
    cli.main([*given, "--accelerator", "cpu", "--parquet", "false"])
    printed = capsys.readouterr().out
    assert "SESS(GradCAM()" in printed
    notes = set(printed.replace("\n", ", ").split(", "))
    assert {"3 explained", "3 images"} <= notes
    assert not [note for note in notes if "broken" in note or "missing" in note]
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {
        "records-0-of-1.jsonl", "results.csv", "results.txt", "classes.csv", "samples.csv", "curves.png",
    }  # fmt: skip


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_several_processes_evaluate_to_the_figures_of_one(nodes, tmp_path, capsys):
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    torch.save(network.state_dict(), tmp_path / "shufflenet.pth")
    root, config = write_own(tmp_path / "own"), write_config(tmp_path / "tiny.yaml")
    given = ["evaluate", "--config", config, "--data", str(root), "--accelerator", "cpu"]
    given += ["--model.name", "shufflenet_v2_x0_5", "--model.weights", str(tmp_path / "shufflenet.pth")]
    cli.main([*given, "--out", str(tmp_path / "one")])
    command = [sys.executable, "-m", "sess_lightning", *given, "--out", str(tmp_path / "all")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [*command, "--devices", "2", "--num_nodes", str(nodes)],
            env=os.environ | {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(nodes)
    ]  # fmt: skip
    done = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * nodes, done[0][1][-2000:]
    lines = "".join(out for out, _ in done).splitlines()
    notes = [line.split(", ") for line in lines if "3 explained" in line]
    assert ["3 images" in line and "missing" not in str(line) for line in notes] == [True]
    shares = sorted((tmp_path / "all").glob(f"records-*-of-{2 * nodes}.jsonl"))
    counts = [path.read_text().count("\n") for path in shares]
    assert counts == ([3, 2] if nodes == 1 else [2, 2, 2, 1])  # A line of settings each.

    def figures(folder):
        rows = (folder / "results.csv").read_text().splitlines()
        return [row for row in rows if "seconds_per_image" not in row]

    assert figures(tmp_path / "all") == figures(tmp_path / "one")


def test_validate_explains_the_model_of_a_checkpoint(tmp_path, monkeypatch):
    made = []

    class Kept(commands.ExplainedCLI):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            made.append(self)

    monkeypatch.setattr(commands, "ExplainedCLI", Kept)
    fitted = fit(tmp_path / "fit")
    fitted.save_checkpoint(tmp_path / "fitted.ckpt")
    cli.main([
        "validate", "--model", "lightning_models.Classifier", "--data", "lightning_models.SquaresData",
        "--ckpt_path", str(tmp_path / "fitted.ckpt"), "--trainer.default_root_dir", str(tmp_path / "out"),
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--sess.num_samples", "4",
    ])  # fmt: skip
    found = made[0].trainer.callback_metrics
    expected = validate(tmp_path / "again", module=fitted.lightning_module).callback_metrics
    assert found["val_loss"] == expected["val_loss"]
    assert found["sess/n"] == 4
    assert {"sess/overall", "sess/base/overall", "sess/pointing_game"} <= set(found)
    assert list((tmp_path / "out").rglob("*panel*"))


def test_explain_writes_a_picture_of_image_base_and_sess(tmp_path, capsys, tiny_network):
    photograph("chelsea").save(tmp_path / "cat.png")
    given = ["explain", str(tmp_path / "cat.png"), "--model.name", "resnet18", "--model.weights", "null"]
    out = tmp_path / "out" / "cat.png"
    cli.main([*given, "--size", "64", "--target", "b", "--out", str(out)])
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*cat\.png: b \(class 1\), probability 0\.\d{3}", first)
    assert second == f"GradCAM beside SESS: {out}"
    with Image.open(out) as drawn:
        assert drawn.width > 3 * 64


def test_explain_tells_of_a_picture_that_viewers_turn(tmp_path, capsys, tiny_network):
    exif, file = Image.Exif(), tmp_path / "phone.jpg"
    for orientation, is_told in ((1, False), (6, True)):
        exif[0x0112] = orientation
        photograph("chelsea").save(file, exif=exif)
        cli.main(["explain", str(file), "--size", "64", "--out", str(tmp_path / "out.png")])
        assert (
            "phone.jpg is explained as stored, but viewers rotate it" in capsys.readouterr().err
        ) == is_told


def assert_one_line(capsys, command, *messages):
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith(f"sess-lightning {command}: ")]
    assert all(message in line for message in messages), line
    assert "Traceback" not in told.err
    assert "usage:" not in told.err


@pytest.mark.parametrize(
    ("file", "target", "message"),
    [
        ("cat.png", "unicorn", "'unicorn' is not one of the 5 class names; give an index"),
        ("cat.png", "aa", "'aa' is not one of the 5 class names (similar: a); give an index"),
        ("cat.png", "5", "the model has the classes 0 to 4, got 5"),
        ("cat.png", "-1", "the model has the classes 0 to 4, got -1"),
        ("dog.png", "0", "dog.png: cannot be read as an image"),
    ],
)
def test_explain_says_in_a_line_what_is_wrong(tmp_path, capsys, tiny_network, file, target, message):
    photograph("chelsea").save(tmp_path / "cat.png")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["explain", str(tmp_path / file), "--model.name", "resnet18", "--target", target])
    assert_one_line(capsys, "explain", message)


def test_help_and_mistakes_show_the_commands(capsys):
    cli.main(["--help"])
    assert capsys.readouterr().out == cli.USAGE
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert capsys.readouterr().err == cli.USAGE
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evalaute"])
    said = "sess-lightning: there is no command 'evalaute'. Did you mean evaluate?\n"
    assert capsys.readouterr().err == said + cli.USAGE


@pytest.fixture
def without_jsonargparse(monkeypatch):
    """What a plain ``pip install`` leaves out."""
    monkeypatch.delitem(sys.modules, "sess_lightning.commands")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)


@pytest.mark.parametrize("command", ["evaluate", "explain", "cost", "fit", "validate", "test"])
def test_a_missing_extra_is_named_in_one_line(capsys, without_jsonargparse, command):
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "--help"])
    assert capsys.readouterr().err == (
        f"sess-lightning {command} needs jsonargparse: pip install 'sess-lightning[cli]' "
        "(in a clone: pip install '.[cli]').\n"
    )


def test_help_and_compare_need_no_extra(capsys, without_jsonargparse, tmp_path):
    cli.main(["--help"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compare", "--help"])
    assert "folder of an evaluation, or its config" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", str(tmp_path)])
    assert "no results.csv; let sess-lightning evaluate finish first" in capsys.readouterr().err


def small(classes=4):
    return torchvision.models.squeezenet1_1(num_classes=classes), torchvision.models.resnet18(
        num_classes=classes
    )


@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "lr": 0.1}])
def test_weights_come_from_state_dicts_and_lightning_checkpoints(tmp_path, prefix, wrap):
    model = small()[1]
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(wrap({**state, "metric.total": torch.zeros(1)}), tmp_path / "a.ckpt")
    loaded = load_network("resnet18", tmp_path / "a.ckpt").model
    assert loaded.fc.out_features == 4
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_head_that_is_a_convolution_has_as_many_classes_as_its_weights(tmp_path):
    model = small(3)[0]
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_network("squeezenet1_1", tmp_path / "a.pth").model
    assert torch.equal(loaded.classifier[1].weight, model.classifier[1].weight)


def test_weights_come_from_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = small()[1]
    safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors")
    loaded = load_network("resnet18", tmp_path / "a.safetensors").model
    assert torch.equal(loaded.fc.weight, model.fc.weight)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole_model.pth")
    with pytest.raises(ValueError, match="contains more than tensors, and loading that could run any code"):
        read_state(tmp_path / "whole_model.pth")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_file_would_run_is_not_run(tmp_path, legacy):
    path = tmp_path / "weights.ckpt"
    state = {"state_dict": {"w": torch.ones(1), "run": Malicious(tmp_path / "was here")}}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="contains more than tensors, and loading that could run any code"):
        read_state(path)
    assert not (tmp_path / "was here").exists()
    torch.load(path, weights_only=False)  # It does run where that is allowed.
    assert (tmp_path / "was here").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(small()[0].state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        load_network("resnet18", tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth is not a file"):
        load_network("resnet18", tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"torchvision has no 'resnet19' \(did you mean resnet18 or"):
        load_network("resnet19")


def test_prefixes_are_found_not_guessed():
    state = {"a.b.w": torch.ones(1), "w": torch.zeros(1), "a.b.v": torch.ones(1)}
    assert fit_names(state, {"w", "v"}, "f") == {"w": torch.ones(1), "v": torch.ones(1)}


def caffe_names(state):
    """TorchRay's file of ResNet-50: batch norms in pairs, blue first, a bias in the first convolution."""
    named = {}
    for name, value in state.items():
        parts = name.split(".")
        is_norm = parts[-2].startswith("bn") or ("downsample" in name and parts[-2] == "1")
        if is_norm:
            parts.insert(-1, "0" if "running" in name or "num_batches" in name else "1")
        named[".".join(parts)] = value
    return named


def test_torchrays_resnet50_is_read_from_a_local_file(tmp_path):
    model = torchvision.models.resnet50(num_classes=20)
    state = caffe_names(model.state_dict())
    state["conv1.bias"] = torch.zeros(64)
    state["fc.weight"] = state["fc.weight"][:, :, None, None]
    torch.save(state, tmp_path / "resnet50_voc.pth.tar")
    network = load_network("resnet50", tmp_path / "resnet50_voc.pth.tar", layout="torchray")
    assert torch.equal(network.model.conv1.weight, model.conv1.weight.flip(1))
    assert torch.equal(network.model.fc.weight, model.fc.weight)
    assert network.mean == pytest.approx((123.68 / 255, 116.779 / 255, 103.939 / 255))
    assert (network.model.maxpool.padding, network.model.maxpool.ceil_mode) == (0, True)
    assert (network.model.layer2[0].conv1.stride, network.model.layer2[0].conv2.stride) == ((2, 2), (1, 1))


def test_torchrays_vgg16_takes_pictures_of_any_shape(monkeypatch, tmp_path):
    with torch.device("meta"):
        plain = torchvision.models.vgg16(num_classes=20).eval()
    plain.to_empty(device="cpu")
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.02)
    renamed = {"classifier.3": "classifier.2", "classifier.6": "classifier.4"}
    state = {
        next((name.replace(old, new) for old, new in renamed.items() if name.startswith(old)), name): value
        for name, value in plain.state_dict().items()
    }
    monkeypatch.setattr(weights, "read_state", lambda path: dict(state))
    (tmp_path / "vgg16_voc.pth.tar").touch()
    network = load_network("vgg16", tmp_path / "vgg16_voc.pth.tar", layout="torchray")
    images = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        # Blue first in the file: the plain network sees the channels reversed.
        assert torch.allclose(network.model(images), plain(images.flip(1)), atol=1e-5)
        assert network.model(torch.zeros(1, 3, 224, 260)).shape == (1, 20)


LIGHTNING = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
ANY = ["--model", "lightning.pytorch.demos.boring_classes.BoringModel",
       "--data", "lightning.pytorch.demos.boring_classes.BoringDataModule",
       "--seed_everything", "0"]  # fmt: skip


@pytest.mark.parametrize("path", LIGHTNING, ids=lambda path: path.stem)
def test_every_config_of_lightning_makes_a_trainer_with_the_callback(path):
    made = commands.ExplainedCLI(args=["--config", str(path), *ANY], run=False)
    (callback,) = [each for each in made.trainer.callbacks if isinstance(each, commands.SESSCallback)]
    private, settings = path.stem == "fit_private", callback.settings
    assert (settings.num_images, settings.num_rows, settings.show_names) == (
        (0, 0, False) if private else (8, 4, True)
    )
    assert settings.every_n_epochs == (5 if path.stem == "fit_cheap" else 1)
    assert settings.alarm is True
    if path.stem in ("fit", "fit_cheap"):
        assert isinstance(settings.method, SESS)
    if path.stem == "fit_best_explained":
        monitors = [each.monitor for each in made.trainer.callbacks if hasattr(each, "monitor")]
        assert monitors == ["sess/selection"]


@pytest.mark.parametrize("name", ["accuracy", "alarm"])
def test_the_accuracys_key_may_be_given_on_the_command_line(name):
    made = commands.ExplainedCLI(args=[*ANY, f"--sess.{name}", "val/top1"], run=False)
    (callback,) = [each for each in made.trainer.callbacks if isinstance(each, commands.SESSCallback)]
    assert callback.settings.accuracy_key == "val/top1"


def test_a_config_with_the_callback_among_the_trainers_is_taken_as_it_is(tmp_path, capsys):
    path = tmp_path / "own.yaml"  # As in the README, under "From YAML".
    path.write_text(
        "trainer: {callbacks: [{class_path: sess_lightning.SESSCallback, init_args: {num_samples: 7}}]}\n"
    )
    made = commands.ExplainedCLI(args=["--config", str(path), *ANY], run=False)
    (callback,) = [each for each in made.trainer.callbacks if isinstance(each, commands.SESSCallback)]
    assert callback.settings.num_samples == 7
    assert "the SESSCallback under trainer.callbacks is the one that runs" in capsys.readouterr().err
    path.write_text(path.read_text().replace("num_samples: 7", "prefix: other"))
    made = commands.ExplainedCLI(args=["--config", str(path), *ANY], run=False)
    callbacks = [each for each in made.trainer.callbacks if isinstance(each, commands.SESSCallback)]
    assert [each.settings.prefix for each in callbacks] == ["other", "sess"]


def test_print_config_is_readable(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(LIGHTNING[0]), *ANY, "--print_config"])
    told = capsys.readouterr().out
    assert "\nsess:\n  method:\n    class_path: sess_lightning.methods.SESS\n" in told
    assert "  num_samples: 32\n" in told


@pytest.fixture
def cat(tmp_path):
    photograph("chelsea").save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


def fails(*arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments])


RANDOM = ["--model.name", "squeezenet1_1", "--model.weights", "null"]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--method", "GradCam"], ["--method: there is no method 'GradCam' (did you mean GradCAM"]),
        (["--method", "Nonsense"], ["there is no method 'Nonsense'; there are CAM, RISE, SESS, "]),
        (["--method", "SESS(GradCAM(), num_scale=2)"],
         ["SESS: 'num_scale' is not an argument (did you mean num_scales"]),
        (["--method", "SESS(GradCAM(), num_scales='x')"], ["num_scales: expected int, got x."]),
        (["--method", "SESS(GradCAM(), num_scales=0)"], ["num_scales must be at least 1, got 0."]),
        (["--method", "SESS(GradCAM("], ["is not a call such as SESS(GradCAM(), num_scales=2)."]),
        (["--size", "big"], ["--size: expected int, got big."]),
        (["--module", "3"], ["'3' contains no module; write MODULE.CLASS, such as my_module.Net."]),
        (["--size", "0", *RANDOM], ["size must be at least 1, got 0."]),
        (["--model.mean", "[123, 117, 104]", *RANDOM], ["mean is of pixels in 0..1, got [123.0, "]),
        (["--out", "maps/"], ["--out: maps has no image suffix; end it in .png or .jpg."]),
        (["--out", f"{__file__}/map.png"], ["--out: ", "test_cli.py cannot be created ("]),
        (["--metod", "CAM"], ["there is no option --metod (did you mean --method", "explain --help."]),
        (["--config", "none.yaml"], ["--config: File does not exist"]),
        (["--model.name", "resnet8"], ["torchvision has no 'resnet8' (did you mean resnet18", "hf/NAME"]),
        (["--model.weights", "none.pth"], ["none.pth is not a file"]),
        (["--checkpoint", "none.ckpt"], ["--checkpoint: give its class, --module my_module.Net"]),
        (["--module", "lightning_models.Clasifier"],
         ["lightning_models has no 'Clasifier' (did you mean Classifier?)."]),
        (["--module", "no_such_module.Net"], ["there is no module 'no_such_module', neither in the current"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_a_remedy(cat, capsys, options, messages):
    fails("explain", cat, *options)
    assert_one_line(capsys, "explain", *messages)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["evaluate"], ["give a folder of images, or a --config that names a benchmark."]),
        (["evaluate", "no_folder"], ["no_folder is not a folder."]),
        (["evaluate", "x", "--benchmark", "VOC7"], ["--benchmark: there is no VOC7."]),
        (["evaluate", "x", "--limits", "few"], ["--limits: expected ", " or ", "int", "dict", ", got few."]),
        (["evaluate", "x", "--limit", "3"], ["there is no option --limit (did you mean --limits?)."]),
        (["cost", "--out", "file/costs.csv"], ["--out: file cannot be created ("]),
        (["compare", "x", "--out", "file"], ["--out: file cannot be created (File exists)."]),
        (["cost", "--method", "GradCm"], ["--method: there is no method 'GradCm' (did you mean GradCAM"]),
        (["cost", "--size", "1", "2", "3"], ["--size: one side, or height and width, got [1, 2, 3]."]),
        (["fit", *ANY, "--sess.num_samples", "-1"],
         ["SESSCallback: num_samples must be a whole number of at least 1, got -1."]),
        (["fit", "--sess.method", "GradCm"], ["--sess.method: there is no method 'GradCm' (did you mean"]),
        (["fit", "--model", "lightning_models.Nett"],
         ["--model: module 'lightning_models' has no attribute 'Nett'. See sess-lightning fit --help."]),
        (["validate", "--ckpt_path", "none.ckpt"], ["arguments are required: --model."]),
        (["test", "--ckpt_path", "none.ckpt", "--model", "lightning_models.Classifier"],
         ["--ckpt_path: none.ckpt is not a file."]),
        (["validate", "--model", "lightning.pytorch.demos.boring_classes.BoringModel",
          "--data", "lightning.pytorch.LightningDataModule", "--trainer.logger", "false",
          "--seed_everything", "0"],
         ["val_dataloader"]),
        (["compare", "no_folder"], ["no_folder: no results.csv"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)  # fmt: skip
def test_every_command_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, messages):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    fails(*arguments)
    assert_one_line(capsys, arguments[0], *messages)


def test_a_config_that_lightning_would_overwrite_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    fails("validate", *ANY, "--trainer.logger", "false", "--trainer.accelerator", "cpu")
    assert_one_line(capsys, "validate", f"{tmp_path / 'config.yaml'} is an earlier run's; move it, or use")


def broken(config):
    raise KeyError("somewhere inside")


def test_an_error_that_nobody_foresaw_is_a_line_and_a_traceback_where_it_is_asked_for(
    cat, capsys, monkeypatch
):
    monkeypatch.setattr(commands, "_network", broken)
    fails("explain", cat)
    assert_one_line(capsys, "explain", "KeyError: 'somewhere inside'. --traceback shows where.")
    with pytest.raises(KeyError):
        cli.main(["explain", cat, "--traceback"])
    monkeypatch.setenv("SESS_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["explain", cat])


def test_ctrl_c_is_a_line_that_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_evaluate", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["evaluate", str(tmp_path)])
    assert_one_line(capsys, "evaluate", "interrupted; the same command continues where it stopped.")
    with pytest.raises(KeyboardInterrupt):
        cli.main(["evaluate", str(tmp_path), "--traceback"])


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("explain", "sess-lightning explain cat.jpg"),
        ("evaluate", "sess-lightning evaluate photos/"),
        ("cost", "sess-lightning cost --model.name resnet50"),
        ("compare", "sess-lightning compare runs/"),
        ("fit", "sess-lightning fit --config configs/fit.yaml"),
        ("validate", "--ckpt_path last.ckpt"),
    ],
)
def test_help_is_for_users_and_has_an_example(capsys, command, example):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    told = capsys.readouterr().out
    assert told.startswith(f"usage: sess-lightning {command} ")
    assert example in told
    of_callback = told.partition("--sess.method METHOD")[2].partition("\n\n")[0]
    assert not re.findall(r"``|\(type|class_path", of_callback)
    if command in ("explain", "evaluate", "cost"):
        assert not re.findall(r"``|<class|known subclasses|class_path|Args:|type:|null\)|%%", told)
        assert {"--method METHOD", "--module MODULE", "--checkpoint CHECKPOINT", "--model.name NAME"} <= {
            line.strip().split("  ")[0] for line in told.splitlines()
        }
        assert told.count("\n") < 95


@pytest.mark.parametrize(
    "text",
    ["SESS(GradCAM(), num_scales=2)", "SESS(GuidedBackprop(), num_scales=3, prefilter_ratio=0.5)", "GradCAM"],
)
def test_a_method_is_given_as_it_prints_itself(tmp_path, text):
    def method(parser, *arguments):
        return parser.instantiate(parser.parse_args([*arguments]))

    plain = text if "(" in text else f"{text}()"
    assert str(method(commands.explain_parser(), "a.png", "--method", text).method) == plain
    assert str(method(commands.cost_parser(), "--method", text).method) == plain
    given = commands.spelled_out(["photos", "--method", text, "--size", "64"])
    made = method(commands.evaluate_parser(with_root=False), *given).experiment
    assert (str(made.method), made.size) == (plain, 64)
    (tmp_path / "a.yaml").write_text(f"sess:\n  method: {text}\n")
    fitted = commands.ExplainedCLI(args=["--config", str(tmp_path / "a.yaml"), *ANY], run=False)
    (callback,) = [each for each in fitted.trainer.callbacks if isinstance(each, commands.SESSCallback)]
    assert str(callback.settings.method) == plain


def test_methods_to_compare_are_given_as_they_print_themselves():
    parser = commands.evaluate_parser(with_root=False)
    given = ["photos", "--compare", "{a: 'SESS(RISE(), num_scales=2)', b: GradCAM, c: 'Blurred(GradCAM())'}"]
    compare = parser.instantiate(parser.parse_args(commands.spelled_out(given))).experiment.compare
    assert {name: str(method) for name, method in compare.items()} == {
        "a": "SESS(RISE(), num_scales=2)", "b": "GradCAM()", "c": "Blurred(GradCAM())",
    }  # fmt: skip


def test_an_option_changes_a_method_that_is_given_as_text():
    parser = commands.explain_parser()
    config = parser.parse_args(["a", "--method", "SESS(GradCAM(), num_scales=2)", "--method.num_scales", "5"])
    assert str(parser.instantiate(config).method) == "SESS(GradCAM(), num_scales=5)"


def test_a_config_may_name_its_own_root_and_the_command_line_another(tmp_path, parser):
    root = write_own(tmp_path / "own")
    (tmp_path / "a.yaml").write_text(
        "model: {name: resnet18, weights: null}\nbenchmark:\n"
        "  class_path: sess_lightning.evaluation.datasets.PictureFolder\n"
        f"  init_args: {{root: {root}}}\n"
    )
    arguments = ["--config", str(tmp_path / "a.yaml")]
    for more, with_root in (([], False), (["--data", str(root)], True)):
        given = commands.given_keys([*arguments, *more])
        assert ({"data", "benchmark"} <= given) is with_root
        parser = commands.evaluate_parser(with_root=with_root)
        assert len(parser.instantiate(parser.parse_args([*arguments, *more])).benchmark) == 3
    with (tmp_path / "a.yaml").open("a") as file:
        file.write(f"data: {root}\n")
    assert {"data", "benchmark"} <= commands.given_keys(arguments)


SMALL = ["--size", "64", "--steps", "2", "--method", "SESS(GradCAM(), num_scales=1)", "--accelerator", "cpu"]


def test_a_folder_of_images_needs_no_config(tmp_path, capsys, tiny_network):
    for name in ("b", "c"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        photograph("chelsea").save(tmp_path / "photos" / name / "a.png")
    cli.main(["evaluate", str(tmp_path / "photos"), *SMALL, "--out", str(tmp_path / "out")])
    assert "2 explained" in capsys.readouterr().out
    samples = (tmp_path / "out" / "samples.csv").read_text()
    assert {row.split(",")[2] for row in samples.splitlines()[1:]} == {"1", "2"}  # As the model counts.
    (tmp_path / "flat").mkdir()
    photograph("chelsea").save(tmp_path / "flat" / "a.png")
    cli.main(["evaluate", str(tmp_path / "flat"), *SMALL, "--out", str(tmp_path / "out2")])
    assert "1 explained" in capsys.readouterr().out


def test_explain_evaluate_and_cost_take_a_module_and_its_checkpoint(cat, tmp_path, capsys, monkeypatch):
    torch.manual_seed(3)
    module = ByHand(classes=4)
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": {"classes": 4, "unknown": 1}}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    given = ["--module", f"{__name__}.ByHand", "--checkpoint", str(tmp_path / "a.ckpt")]
    seen = []

    def network(config, make=commands._network):
        seen.append(make(config).model)
        return make(config)

    monkeypatch.setattr(commands, "_network", network)
    cli.main(
        ["explain", cat, *given, "--size", "64", "--method", "GradCAM", "--out", str(tmp_path / "a.png")]
    )
    told = capsys.readouterr()
    assert "class " in told.out
    assert "normalised by ImageNet's mean and std; for others, pass --model.mean" in told.err
    (tmp_path / "flat").mkdir()
    photograph("chelsea").save(tmp_path / "flat" / "a.png")
    cli.main(["evaluate", str(tmp_path / "flat"), *given, *SMALL, "--out", str(tmp_path / "out")])
    cli.main(["cost", *given, "--size", "32", "--rounds", "1", "--method", "GradCAM"])
    told = capsys.readouterr()
    assert "model: ByHand" in told.out
    assert "normalised" not in told.err.splitlines()[-1:]
    assert len(seen) == 3
    for model in seen:
        assert all(map(torch.equal, model.parameters(), module.parameters()))


class ByHand(nn.Module):
    def __init__(self, classes: int, width: int = 4):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3, stride=4), nn.Linear(width, classes)

    def forward(self, images):
        return self.head(self.conv(images).relu().mean((2, 3)))


def test_a_layer_on_a_stated_grid_is_written_as_it_prints_itself(capsys, cat, tmp_path):
    method = str(GradCAM(OnGrid("features.12", Grid("channels", 3, 6))))
    given = ["explain", cat, *RANDOM, "--size", "64", "--out", f"{tmp_path}/a.png"]
    cli.main([*given, "--method", method])
    assert capsys.readouterr().out.endswith(f"GradCAM: {tmp_path}/a.png\n")
    fails(*given, "--method", method.replace("height=3", "height=4"))
    assert_one_line(capsys, "explain", "lie on no grid")


@pytest.mark.parametrize(("mean", "std"), [("[0.5]", None), (None, "[0.2]"), ("[0.5]", "[0.2]")])
def test_one_value_of_the_mean_or_the_deviation_stands_for_all_channels(mean, std, capsys, cat, tmp_path):
    def line(times):
        """Return what ``explain`` prints where each value is given so many times."""
        given = {"--model.mean": mean, "--model.std": std}
        options = [f"{name}={[float(text.strip('[]'))] * times}" for name, text in given.items() if text]
        cli.main(["explain", cat, "--method", "GradCAM", *RANDOM, "--out", f"{tmp_path}/a.png", *options])
        return capsys.readouterr().out

    assert line(1) == line(3)


def test_a_model_of_grey_squares_is_explained_and_evaluated(tmp_path, capsys):
    root = write_own(tmp_path / "own")  # 96 x 64 px and the like, in colour.
    (root / "annotations.json").unlink()
    asked = ["--module", "small_nets.LeNet", "--size", "28"]
    cli.main(["explain", str(root / "animal" / "chelsea.png"), *asked, "--out", str(tmp_path / "out.png")])
    assert re.search(r"probability 0\.\d{3}", capsys.readouterr().out)
    more = ["--out", str(tmp_path / "out"), "--steps", "2", "--accelerator", "cpu", "--parquet", "false"]
    cli.main(["evaluate", str(root / "thing"), *asked, *more])
    assert "2 explained" in capsys.readouterr().out
    fails("explain", str(root / "animal" / "chelsea.png"), *asked[:2])
    assert_one_line(capsys, "explain", "The model may take images of one size only; give it by --size.")


def test_the_seed_draws_random_weights():
    def weights_of(seed):
        parser = commands.explain_parser()
        options = ["--model.name", "squeezenet1_1", "--model.weights", "null"]
        config = parser.parse_args(["a.png", *options, "--seed", seed])
        return next(commands._network(config).model.parameters())

    assert torch.equal(weights_of("1"), weights_of("1"))
    assert not torch.equal(weights_of("1"), weights_of("2"))


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "only_here.py").write_text(
        "from lightning_models import Classifier, SquaresData\n"
        "class Net(Classifier): pass\n"
        "def adapt(batch): return batch\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["fit", "--model", "only_here.Net", "--data", "only_here.SquaresData",
                  "--sess.batch_adapter", "only_here.adapt", "--print_config"])  # fmt: skip
    told = capsys.readouterr().out
    assert "only_here.Net" in told
    assert "batch_adapter: only_here.adapt" in told
    del sys.modules["only_here"]
