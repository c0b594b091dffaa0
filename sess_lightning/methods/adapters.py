"""Any attribution of captum and any CAM of grad-cam, by class or by name."""

import importlib
import inspect
import io
import random
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sess_lightning.introspection.hooks import first_tensor, with_first_tensor
from sess_lightning.introspection.layers import Site, TargetLayer, read_features
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import check_targets, classify
from sess_lightning.introspection.sizes import blank_image
from sess_lightning.methods.templates import MapMethod
from sess_lightning.ops import min_max, size_of, upsample
from sess_lightning.types import Activation

PLACES = 7
"""Rows and columns of the patches that perturbation methods switch by default."""


@dataclass(frozen=True, init=False)
class Adapter(MapMethod):
    """What both adapters share: finding the class, its options, lending the model, counting the cost."""

    method: str | type
    options: dict[str, Any] | None = field(default=None, hash=False)
    target_layer: TargetLayer = None
    activation: Activation = "softmax"
    package: ClassVar[str]
    extra: ClassVar[str]

    def __init__(
        self,
        method: str | type,
        options: Mapping[str, Any] | None = None,
        *,
        target_layer: TargetLayer = None,
        activation: Activation = "softmax",
        **more: Any,
    ) -> None:
        """Take options as keywords, or as a dict, as YAML gives them."""
        if isinstance(method, type) and method.__module__.startswith(f"{self.package.split('.')[0]}."):
            method = method.__name__
        # YAML only has lists, but captum wants tuples.
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in {**(options or {}), **more}.items()
        }
        values = {"method": method, "options": given or None}
        for name, value in {**values, "target_layer": target_layer, "activation": activation}.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def _draw(
        self,
        kind: type[Any],
        model: "_Classifier",
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " B"],
    ) -> Tensor:
        """Run the package; return maps of any range and size."""

    def maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return what the package gives, drawn at full resolution.

        Raises:
            ImportError: If the package is not installed.
            ValueError: If the package has no such method, or an option that it needs is missing.
        """
        return self._run(model, images, targets)[0]

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return how many forward passes one map costs, counted on an empty image: only the package knows."""
        image = blank_image(model, size)
        with explaining(model):
            return self._run(model, image, torch.zeros(1, dtype=torch.long, device=image.device))[1]

    def _run(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Float[Tensor, "B H W"], int]:
        """Return maps, and forward passes of an image."""
        kind, site, shape, passed = self._kind(), None, None, 0
        if self._needs_layer(kind):
            with torch.no_grad():
                _, features, site = read_features(model, self.target_layer, images)
            shape, passed = site.to_maps(features).shape, len(images)
            if len(site.grids) > 1:
                raise self._refuse(
                    kind, f"{site.name} runs on several views of the image; name a later layer"
                )
        with _lent(model, site, targets) as classifier:
            classifier.images, classifier.shape = passed, shape
            maps = self._draw(kind, classifier, images.clone().requires_grad_(), targets)
        maps = maps.detach().to(images.device, torch.float32)
        return min_max(upsample(maps, size_of(images))), classifier.images // len(images)

    def _needs_layer(self, kind: type[Any]) -> bool:  # noqa: ARG002
        return True

    def check(self) -> None:
        """Refuse what is not there; nothing is run.

        Raises:
            ImportError: If the package is not installed.
            ValueError: If the package has no such method.
        """
        self._kind()

    def _kind(self) -> type[Any]:
        try:
            package = importlib.import_module(self.package)
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__} needs the package {self.extra}: "
                f"pip install 'sess-lightning[adapters]' ({error})."
            ) from error
        if isinstance(self.method, type):
            return self.method
        kind = getattr(package, self.method, None)
        if not isinstance(kind, type):
            known = ", ".join(
                sorted(name for name, value in vars(package).items() if isinstance(value, type))
            )
            raise ValueError(f"{type(self).__name__}: {self.extra} has no {self.method!r}; it has {known}.")
        return kind

    def _refuse(self, kind: type[Any], what: str) -> ValueError:
        return ValueError(f"{type(self).__name__}({kind.__name__}): {what}.")

    def _options(self, kind: type[Any], call: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Distribute the options between the constructor and the call."""
        build, calls = _parameters(kind), _parameters(call)
        given = self.options or {}
        unknown = [name for name in given if name not in build and name not in calls]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in (*build.values(), *calls.values())):
            raise self._refuse(kind, f"has no option {', '.join(unknown)}; it has {', '.join(build | calls)}")
        return (
            {name: value for name, value in given.items() if name in build},
            {name: value for name, value in given.items() if name not in build},
        )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


class _Probe(nn.Module):
    """The layer that packages see: the target layer's features pass through it as float32 (B, K, h, w)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.clone()  # LRP distinguishes input and output.


class _Classifier(nn.Module):
    """A model as packages need it: it returns at least two logits, and its target layer is on a grid.

    What the packages do to it (``eval``, ``zero_grad``, swapping the layer) does not reach the model.
    """

    def __init__(self, model: nn.Module, targets: Int[Tensor, " B"]) -> None:
        super().__init__()
        self.model, self.targets = model, targets
        self.probe = _Probe()
        self.shape: torch.Size | None = None
        self.images, self.calls = 0, 0
        self.training = self.probe.training = False

    def forward(self, images: Tensor) -> Tensor:
        self.images, self.calls = self.images + len(images), 0
        logits = classify(self.model, images).float()
        check_targets(logits, self.targets)
        return torch.cat([-logits, logits], 1) if logits.shape[1] == 1 else logits

    def train(self, mode: bool = True) -> "_Classifier":  # noqa: ARG002
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def through_probe(self, site: Site, output: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if number not in site.grids:
            return output
        grid, features = site.grids[number], first_tensor(output)
        maps = self.probe(grid.to_maps(features).float())
        # The clone lets whatever follows work in place, while the package still holds the maps.
        return with_first_tensor(output, grid.put_back(maps.clone(), features))


@contextmanager
def _lent(model: nn.Module, site: Site | None, targets: Tensor) -> Iterator[_Classifier]:
    """Lend a model to code that hooks, patches and differentiates freely; restore it afterwards."""
    stores = [
        store
        for module in model.modules()
        for store in (vars(module), *(value for value in vars(module).values() if isinstance(value, dict)))
    ]
    kept = [(store, dict(store)) for store in stores]
    stand_ins = {p: nn.Parameter(p.data, p.is_floating_point()) for p in model.parameters()}
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        try:
            # The same values in other tensors: a `backward()` leaves its gradients there, and triggers no
            # hook of DDP.
            for module in model.modules():
                parameters = module._parameters
                parameters.update({name: stand_ins[p] for name, p in parameters.items() if p is not None})
            classifier = _Classifier(model, targets)
            if site is not None:
                layer = dict(model.named_modules(remove_duplicate=False))[site.name]
                layer.register_forward_hook(lambda _, __, output: classifier.through_probe(site, output))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"captum|pytorch_grad_cam")
            for redirect in (redirect_stdout, redirect_stderr):  # Progress bars and messages.
                stack.enter_context(redirect(io.StringIO()))
            yield classifier
        finally:
            for store, before in kept:
                store.clear()
                store.update(before)
            random.setstate(generators[0])
            np.random.set_state(generators[1])  # noqa: NPY002


@dataclass(frozen=True, init=False)
class PytorchGradCAM(Adapter):
    """Any CAM of the package ``grad-cam`` (pytorch_grad_cam), e.g. ``PytorchGradCAM("EigenCAM")``.

    The package works in NumPy, so every call waits for the device; where there is a choice, the methods of
    this package are quicker. Features of transformers reach it as (B, C, h, w), without class and register
    tokens.

    Attributes:
        method: Name of the class, or the class itself.
        options: Options of its constructor or its call; in Python, also given as keywords.
        target_layer: As for ``GradCAM``.
        activation: How the model's logits become probabilities.

    >>> PytorchGradCAM("EigenCAM")(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    package: ClassVar[str] = "pytorch_grad_cam"
    extra: ClassVar[str] = "grad-cam"

    def _draw(self, kind: type[Any], model: "_Classifier", images: Tensor, targets: Tensor) -> Tensor:
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        takes = _parameters(kind)
        if not ({"model", "target_layers"} <= takes.keys() and hasattr(kind, "forward")):
            raise self._refuse(kind, "is not a CAM of a target layer")
        # Some classes document their options on `forward` only, others on `__call__` only.
        named = kind.__call__ if "targets" in _parameters(kind.__call__) else kind.forward
        build, call = self._options(kind, named)
        cam = kind(model, [model.probe], **build)
        if "target_idx" in _parameters(named):  # FinerCAM compares a given class with others.
            pairs = zip(images.split(1), targets.tolist(), strict=True)
            maps = np.concatenate([cam(image, None, target_idx=target, **call) for image, target in pairs])
        else:
            chosen = [ClassifierOutputTarget(target) for target in targets.tolist()]
            maps = cam(input_tensor=images, targets=chosen, **call)
        return torch.from_numpy(np.asarray(maps, dtype=np.float32))


@dataclass(frozen=True, init=False)
class Captum(Adapter):
    """Any attribution of the package captum, e.g. ``Captum("IntegratedGradients", n_steps=20)``.

    Arguments that captum requires have defaults for image classifiers: zeros (the mean image) as baselines, 7
    x 7 patches as features to switch off, windows of a seventh of the image for Occlusion, 32 images at a
    time. Layer methods get the target layer.

    Attributes:
        method: Name of the class, or the class itself.
        options: Options of its constructor or its ``attribute``; in Python, also given as keywords.
        target_layer: As for ``GradCAM``; methods of the pixels need none.
        activation: How the model's logits become probabilities.
        absolute: Sum |attribution| over channels; False sums the signed one and keeps the evidence for the
            target; None is True for pixel gradients, False for layers and perturbations.

    >>> Captum("IntegratedGradients", n_steps=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    absolute: bool | None = None
    package: ClassVar[str] = "captum.attr"
    extra: ClassVar[str] = "captum"

    def __init__(
        self,
        method: str | type,
        options: Mapping[str, Any] | None = None,
        *,
        target_layer: TargetLayer = None,
        activation: Activation = "softmax",
        absolute: bool | None = None,
        **more: Any,
    ) -> None:
        """Take options as keywords, or as a dict, as YAML gives them."""
        super().__init__(method, options, target_layer=target_layer, activation=activation, **more)
        object.__setattr__(self, "absolute", absolute)

    def _needs_layer(self, kind: type[Any]) -> bool:
        return "layer" in _parameters(kind)

    def _draw(self, kind: type[Any], model: "_Classifier", images: Tensor, targets: Tensor) -> Tensor:
        from captum.attr import GradientAttribution, LayerAttribution

        if not hasattr(kind, "attribute"):
            raise self._refuse(kind, "is not an attribution method")
        for name, why in _REFUSED.items():
            if kind.__name__.endswith(name):
                raise self._refuse(kind, why)
        if kind.__name__.endswith("LRP"):
            from captum.attr._utils.lrp_rules import IdentityRule

            model.probe.rule = IdentityRule()  # As in captum's documentation: a rule is an attribute.
        build, call = self._options(kind, kind.attribute)
        takes = _parameters(kind.attribute)
        given = {"model": model, "forward_func": model, "layer": model.probe}
        build = {**_wanted(kind, given), **build}
        call = {**_wanted(kind.attribute, self._defaults(takes, model, images, targets)), **call}
        missing = [
            name
            for name, p in (_parameters(kind) | takes).items()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name not in build | call
        ]
        if missing:
            raise self._refuse(
                kind, f"needs {', '.join(missing)}, which has no default; pass it, or use another"
            )
        attribution = kind(**build).attribute(**call)
        attribution = first_tensor(attribution).float()
        absolute = self.absolute
        if absolute is None:
            absolute = issubclass(kind, GradientAttribution) and not issubclass(kind, LayerAttribution)
        return attribution.abs().sum(1) if absolute else attribution.sum(1).relu()

    @staticmethod
    def _defaults(
        takes: Mapping[str, inspect.Parameter], model: "_Classifier", images: Tensor, targets: Tensor
    ) -> dict[str, Any]:
        (channels, height, width), chunk = images.shape[1:], max(32, len(images))
        window = (channels, max(1, height // PLACES), max(1, width // PLACES))
        defaults = {
            "inputs": images,
            "target": targets,
            "sliding_window_shapes": window,
            "strides": (channels, *(max(1, side // 2) for side in window[1:])),
            "feature_mask": _patches(height, width, images.device),
            "internal_batch_size": chunk,
            "perturbations_per_eval": chunk // len(images),
        }
        if model.shape is not None:
            height, width = model.shape[2:]
            places = torch.arange(height * width, device=images.device).view(1, 1, height, width)
            defaults["layer_mask"] = places.expand(1, model.shape[1], -1, -1)
            defaults["perturbations_per_eval"] = 1  # captum does not repeat the targets of a layer's images.
        if "baselines" in takes and takes["baselines"].default is inspect.Parameter.empty:
            defaults["baselines"] = torch.zeros_like(images[:1]).repeat(2, 1, 1, 1)
        return defaults


_REFUSED = {
    "FeaturePermutation": "swaps features between the images of a batch, which explains none of them",
    "ShapleyValues": "tries every order of the features, which never ends; use ShapleyValueSampling",
}


def _wanted(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _parameters(function) if name in values}


def _patches(height: int, width: int, device: torch.device) -> Int[Tensor, "1 1 H W"]:
    rows, columns = (torch.arange(n, device=device) * PLACES // n for n in (height, width))
    return (rows[:, None] * PLACES + columns)[None, None]
