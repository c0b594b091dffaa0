"""What a model is: its logits, its scores, its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.lending import borrowed, explaining
from sess_lightning.ops import size_of
from sess_lightning.types import Activation

_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[int, int], str]] = WeakKeyDictionary()


def logits_of(output: Any) -> Float[Tensor, "B N"]:
    """Return the logits in what a classifier returned: a tensor, a tuple (first), a dict or a ``.logits``.

    Raises:
        TypeError: If no logits are found.
        ValueError: If they are not (batch, classes).
    """
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"The model's forward returned {type(output).__name__}; expected logits (B, N) as a tensor, the "
            'first item of a tuple, a dict\'s "logits" or an attribute `.logits`. Wrap the model so that it '
            "returns them."
        )
    if found.ndim == 1:
        found = found[:, None]
    if found.ndim != 2:
        raise ValueError(
            f"The model's logits have shape {tuple(found.shape)}; expected (batch, classes). "
            "For dense outputs, wrap the model so that it pools them."
        )
    return found


def target_logits(logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return each target's logit; a head with a single logit speaks for class 1, and negated for class 0.

    Raises:
        ValueError: If a target is none of the model's classes. Where reading it would wait for the device it
            is not read: there, such a target's logit is NaN.
    """
    classes = max(2, logits.shape[1])
    if targets.device.type == "cpu" and not all(0 <= target < classes for target in targets.tolist()):
        raise ValueError(
            f"targets must be class indices in 0..{classes - 1}, as the model has, got {targets.tolist()}; "
            "leave out samples without a class, and check that labels and model count classes alike."
        )
    if logits.shape[1] == 1:
        logits = torch.cat([-logits, logits], 1)
    known = (targets >= 0) & (targets < classes)
    # Clamped, because out of range is a fault that kills the whole process on a GPU.
    return torch.where(
        known, logits.gather(1, targets[:, None].long().clamp(0, classes - 1))[:, 0], torch.nan
    )


def log_scores(
    logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"], activation: Activation = "softmax"
) -> Float[Tensor, " B"]:
    """Return the logarithm of each target's probability, float32.

    Args:
        logits: Raw outputs.
        targets: Class indices.
        activation: ``"softmax"`` for single-label heads, ``"sigmoid"`` for multi-label ones; a head with a
            single logit is always read with a sigmoid.
    """
    logits = logits.to(torch.float32)
    if activation == "sigmoid" or logits.shape[1] == 1:
        return F.logsigmoid(target_logits(logits, targets))
    return target_logits(logits.log_softmax(1), targets)


def classify(model: nn.Module, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
    """Run one forward and return the logits.

    Raises:
        ValueError: If the model does not take images with this number of channels.
    """
    try:
        return logits_of(model(images))
    except RuntimeError as error:
        if f"got {images.shape[1]} channels" not in str(error):
            raise
        raise ValueError(
            f"images have {images.shape[1]} channels, which the model does not take; give them as the model "
            f"takes them ({error})."
        ) from error


def predict(logits: Float[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """Return the class of the highest logit; of a single logit, 1 where it is positive."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


@torch.no_grad()
def score(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    activation: Activation = "softmax",
) -> Float[Tensor, " B"]:
    """Return the log-score of each target: one plain forward."""
    return log_scores(classify(model, images), targets, activation)


def check_inputs(speaker: str, images: Tensor, targets: Tensor) -> None:
    """Refuse what no method can explain; values are read only where that waits for no device.

    Raises:
        TypeError: If an argument is not a tensor of the right kind.
        ValueError: If a shape is wrong, or a picture on the CPU holds NaN or infinity.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            f"{speaker}: images must be a floating point tensor as the model takes it, got {_kind(images)}; "
            "convert and normalise the pictures first."
        )
    if images.ndim != 4:
        raise ValueError(
            f"{speaker}: images must be (B, C, H, W), got {tuple(images.shape)}; "
            "use images[None] for a single image."
        )
    if 0 in images.shape:
        raise ValueError(f"{speaker}: images is empty, {tuple(images.shape)}; give at least one image.")
    if not isinstance(targets, Tensor) or targets.dtype not in _INTEGERS:
        raise TypeError(
            f"{speaker}: targets must be an integer tensor of class indices, one per image, got "
            f"{_kind(targets)}; use targets.long(), or logits.argmax(1) to explain predictions."
        )
    if targets.shape != images.shape[:1]:
        raise ValueError(
            f"{speaker}: targets must have shape ({images.shape[0]},), one class index per image, "
            f"got {tuple(targets.shape)}; use one target per image."
        )
    if targets.device != images.device:
        raise ValueError(
            f"{speaker}: targets are on {targets.device}, images on {images.device}; move them together."
        )
    if images.device.type == "cpu" and not images.isfinite().all().tolist():
        raise ValueError(f"{speaker}: images hold NaN or infinite values; clean the pictures first.")


_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


@dataclass
class Tap:
    """What passed through a layer.

    Attributes:
        features: The layer's output, detached, with gradients on: differentiate the head's output by it.
    """

    features: Tensor | None = None


@contextmanager
def recording(layer: nn.Module) -> Iterator[Tap]:
    """Cut the graph at a layer: run the forward under ``no_grad`` and only what follows is recorded.

    A layer that is called several times is cut at its last call.
    """
    tap = Tap()

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        features = first_tensor(output)
        if features.is_inference():
            raise RuntimeError(
                "The model's forward runs the target layer in its own inference_mode, which no gradient "
                "leaves; use no_grad there, or name a target_layer outside of it."
            )
        features = features.detach().requires_grad_()
        tap.features = features
        torch.set_grad_enabled(True)  # The surrounding no_grad puts the mode back.
        # The clone lets whatever follows work in place: a leaf may not be written to.
        return with_first_tensor(output, features.clone())

    handle = layer.register_forward_hook(cut)
    try:
        yield tap
    finally:
        handle.remove()


def head_forward(
    model: nn.Module, layer: nn.Module, images: Float[Tensor, "B C H W"]
) -> tuple[Float[Tensor, "B N"], Tensor]:
    """Run one forward and return the logits and the layer's features, with a graph from these to those.

    Raises:
        RuntimeError: If the layer never ran.
    """
    # A backbone inside the model's own `no_grad` switches recording off again on its way out; retried, its
    # surroundings have gradients on.
    for grad in (False, True):
        with recording(layer) as tap, torch.set_grad_enabled(grad):
            logits = classify(model, images)
        if logits.requires_grad:
            break
    if tap.features is None:
        raise RuntimeError(
            f"target_layer {type(layer).__name__} did not run in the model's forward, so its features are "
            "unknown; name one that does. Scripted, traced and exported modules cannot be looked into."
        )
    return logits, tap.features


def gradient(outputs: Float[Tensor, " B"], inputs: Tensor, retain_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of ``outputs`` by ``inputs``; no ``.grad`` is touched.

    Raises:
        RuntimeError: If no gradient flows from the one to the other.
    """
    found = _gradient(outputs.float().sum(), inputs, retain_graph)
    if found is None:
        raise RuntimeError(
            "No gradient flows from the model's logits back to the target layer or the image: the forward "
            "detaches it, or runs it under no_grad or under a checkpoint with use_reentrant=True. "
            "Name a later target_layer, or change the forward."
        )
    return found


def _gradient(output: Float[Tensor, ""], inputs: Tensor, retain_graph: bool = False) -> Tensor | None:
    if not output.requires_grad:
        return None
    try:
        return torch.autograd.grad(output, inputs, retain_graph=retain_graph, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "The model's forward runs under a checkpoint with use_reentrant=True, which shows gradients to "
            "backward() only; give it use_reentrant=False."
        ) from error


def first_tensor(output: Any) -> Tensor:
    """Return a layer's output, or the first tensor in a tuple or dict of outputs.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)) or isinstance(output, Mapping):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(
        f"target_layer must return a tensor, or a tuple or dict that holds one, got {type(output).__name__}; "
        "name another layer."
    )


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """Return a layer's output with another first tensor."""
    if isinstance(output, Tensor):
        return tensor
    first = first_tensor(output)
    if isinstance(output, Mapping):
        key = next(key for key, value in output.items() if value is first)
        replaced = type(output)(output)  # type: ignore[call-arg]
        replaced[key] = tensor  # type: ignore[index]
        return replaced
    values = [tensor if value is first else value for value in output]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def resolve_layer(
    model: nn.Module, target_layer: str | nn.Module | None, images: Float[Tensor, "B C H W"]
) -> nn.Module:
    """Return the module that ``target_layer`` means: a module, a dotted name, or None to find one.

    Raises:
        ValueError: If the model has no such layer.
    """
    if target_layer is None:
        return find_target_layer(model, images)
    modules: dict[str, nn.Module] = {
        _plain(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    if isinstance(target_layer, nn.Module):
        if not any(module is target_layer for module in modules.values()):
            raise ValueError(
                f"target_layer {type(target_layer).__name__} is not a part of this model; give one of its "
                'own modules, or a dotted name such as "layer4".'
            )
        return target_layer
    found = modules.get(_plain(target_layer))
    if found is None or not target_layer:
        near = [name for name in modules if name and name.count(".") < 2]
        raise ValueError(
            f"target_layer {target_layer!r} is unknown; this model has, among others, "
            f"{', '.join(near[-12:])}; leave it out to have one found."
        )
    return found


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")  # torch.compile's wrapper.


def find_target_layer(model: nn.Module, images: Float[Tensor, "B C H W"]) -> nn.Module:
    """Find the last layer whose features still lie on a grid, by one traced forward of one image.

    For a CNN that is the block before global pooling (ResNet's ``layer4``, VGG-16's last ReLU before its last
    pooling). For a transformer it is the last layer, keys and values aside, whose patch tokens still reach
    the logits: a class token is read at the end, so the very last layers tell nothing about place (ViT's last
    block's ``norm1``). The answer is remembered per model and image size.

    Raises:
        ValueError: If no layer keeps a grid.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    remembered = _FOUND.setdefault(model, {})
    size = size_of(images)
    if remembered.get(size) not in modules:
        with explaining(model):
            remembered[size] = _last_on_a_grid(model, borrowed(images[:1]))
    return modules[remembered[size]]


_PASS_THROUGH = (
    nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten,
    nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.MaxPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip


def _last_on_a_grid(model: nn.Module, image: Float[Tensor, "1 C H W"]) -> str:
    size = size_of(image)
    logits, seen = _trace(model, image)
    probe = _probe(logits, seen)
    second_choice = None
    for name, features in reversed(seen):
        grid = find_grid(features.shape, size)
        if grid is None or features.shape[0] != 1:
            continue
        reached = _gradient(probe, features, retain_graph=True)
        if reached is None or not grid.to_maps(reached).any():
            continue
        # Keys and values, which a class token reads, are parts of the attention, not features of a place.
        projection = grid.layout == "tokens" and isinstance(model.get_submodule(name), nn.Linear)
        class_map = grid.channels == logits.shape[1] and _is_class_map(logits, features, grid)
        if not projection and not class_map:
            return name
        second_choice = second_choice or name
    if second_choice is not None:
        return second_choice
    tried = ", ".join(f"{name} {tuple(features.shape)}" for name, features in seen[-6:])
    raise ValueError(
        f"No layer with spatial features reaches the logits for a {size[0]}x{size[1]} image "
        f"(the last ones seen: {tried}). Name target_layer, or use larger images."
    )


def _trace(
    model: nn.Module, image: Float[Tensor, "1 C H W"]
) -> tuple[Float[Tensor, "1 N"], list[tuple[str, Tensor]]]:
    """Return the logits and what each layer gave, in order; layers that only pool or pass on are left out."""
    names = {module: name for name, module in model.named_modules() if name}
    seen: list[tuple[str, Tensor]] = []
    passed: list[tuple[Tensor, int]] = []  # Held, so that no tensor's identity is used twice.

    def note(module: nn.Module, _inputs: Any, output: Any) -> Any:
        try:
            features = first_tensor(output)
        except TypeError:
            return output
        if isinstance(module, _PASS_THROUGH):
            passed.append((features, features._version))
            return output
        # Written to since it passed, as by an activation in place, it is features again.
        merely_passed = any(features is tensor and features._version == v for tensor, v in passed)
        if merely_passed or not features.requires_grad:
            return output
        # A copy is reached by what reads the layer's output only, not by what the layer itself made of it:
        # Hugging Face's backbones give features and a pooled output, and the head reads the latter.
        features = features.clone()
        seen.append((names[module], features))
        return with_first_tensor(output, features)

    def record(_module: nn.Module, _inputs: Any) -> None:
        torch.set_grad_enabled(True)  # Even where the model's own `no_grad` wraps a frozen backbone.

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(record).remove)
            stack.callback(module.register_forward_hook(note).remove)
        return classify(model, image.requires_grad_().clone()), seen


def _is_class_map(logits: Float[Tensor, "1 N"], features: Tensor, grid: Grid) -> bool:
    """Whether the features are the logits before pooling: each logit then hangs on its own channel."""
    reached = _gradient(logits[0, 0], features, retain_graph=True)
    return reached is not None and not grid.to_maps(reached)[:, 1:].any()


def _probe(logits: Tensor, seen: list[tuple[str, Tensor]]) -> Tensor:
    """Return a scalar whose gradient tells what can reach the logits."""
    mix = torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)
    probe = (logits * mix).sum()
    before_head = [
        features for _, features in seen if features.ndim == 2 and features.shape[1] != logits.shape[1]
    ]
    if not logits.any() and before_head:
        # A head of zeros, as an untrained torchvision ViT has, stops every gradient: look in front of it.
        probe = before_head[-1].cumsum(1).sum()
    return probe


@dataclass(frozen=True)
class Grid:
    """How a layer's features lie on the image.

    Attributes:
        layout: ``"channels"`` (B, C, h, w), ``"channels_last"`` (B, h, w, C) or ``"tokens"``
            (B, extra + h * w, C).
        height: Rows of the grid.
        width: Columns of the grid.
        channels: Feature channels.
        extra: Leading tokens that belong to no place (class, distillation, register tokens).
    """

    layout: str
    height: int
    width: int
    channels: int
    extra: int = field(default=0)

    def to_maps(self, features: Tensor) -> Float[Tensor, "B C h w"]:
        """Return features as (B, C, h, w)."""
        if self.layout == "channels_last":
            return features.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            features = features[:, self.extra :].unflatten(1, (self.height, self.width))
            return features.permute(0, 3, 1, 2)
        return features


def find_grid(shape: tuple[int, ...], size: tuple[int, int]) -> Grid | None:
    """Read a feature shape as a grid over an image of ``size``, or return None if it is none.

    Channels may come first or last: the reading whose proportions fit the image's wins, if they fit at all.
    Tokens (B, N, C) are read with the patch size that leaves the fewest tokens over.
    """
    height, width = size
    if len(shape) == 4:
        readings = [Grid("channels", shape[2], shape[3], shape[1]), Grid("channels_last", *shape[1:])]
        misfits = [_misfit(grid, height, width) for grid in readings]
        return readings[misfits.index(min(misfits))] if min(misfits) < 2 else None
    if len(shape) == 3 and shape[2] > 1:
        grids = {(height // patch, width // patch) for patch in range(2, min(height, width) + 1)}
        tokens = [
            Grid("tokens", *grid, shape[2], shape[1] - grid[0] * grid[1]) for grid in grids if grid != (1, 1)
        ]
        return min(
            (grid for grid in tokens if 0 <= grid.extra <= 32), key=lambda grid: grid.extra, default=None
        )
    return None


def _misfit(grid: Grid, height: int, width: int) -> float:
    """How many times longer or flatter the grid is than the image; infinite where it is no grid over it."""
    if grid.height * grid.width == 1 or grid.height > height or grid.width > width:
        return float("inf")
    ratio = grid.height * width / (grid.width * height)
    return max(ratio, 1 / ratio)


def input_window(model: nn.Module) -> int | None:
    """Return the side of the square input a model was built for, where it says so; None otherwise.

    Read from torchvision's ``image_size``, timm's ``pretrained_cfg`` and Hugging Face's
    ``config.image_size``, on the model or on a wrapped one.
    """
    for module in model.modules():
        for size in _stated_sizes(module):
            side = size[-1] if isinstance(size, (tuple, list)) and size else size
            if isinstance(side, int) and side > 0:
                return side
    return None


def _stated_sizes(module: nn.Module) -> Iterator[Any]:
    if hasattr(module, "encoder"):
        yield vars(module).get("image_size")
    cfg = vars(module).get("pretrained_cfg")
    if isinstance(cfg, Mapping) and cfg.get("fixed_input_size"):
        yield getattr(getattr(module, "patch_embed", None), "img_size", None)  # Of the model as it was made.
        yield cfg.get("input_size")
    config = vars(module).get("config")
    if config is not None and not isinstance(config, Mapping):
        yield getattr(config, "image_size", None)
