"""What a model is, and how to borrow it: its logits, its scores, its layers; every change is given back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sess_lightning.types import Activation

_LENT: ContextVar[tuple[nn.Module, ...]] = ContextVar("_LENT", default=())
_FOUND: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


# What a model says ----------------------------------------------------------------------------------------


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
            f"The model's forward returned {type(output).__name__}; expected logits (B, N) as a tensor, the first "
            'item of a tuple, a dict\'s "logits" or an attribute `.logits`. Wrap the model so that it returns them.'
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
    """Return each target's logit; a head with a single logit speaks for class 1, and negated for class 0."""
    if logits.shape[1] == 1:
        return torch.where(targets > 0, logits[:, 0], -logits[:, 0])
    return logits.gather(1, targets[:, None].long())[:, 0]


def log_scores(
    logits: Float[Tensor, "B N"], targets: Int[Tensor, " B"], activation: Activation = "softmax"
) -> Float[Tensor, " B"]:
    """Return the logarithm of each target's probability, float32.

    Args:
        logits: Raw outputs.
        targets: Class indices.
        activation: ``"softmax"`` for single-label heads, ``"sigmoid"`` for multi-label ones; a head with a single
            logit is always read with a sigmoid.
    """
    logits = logits.to(torch.float32)
    if activation == "sigmoid" or logits.shape[1] == 1:
        return F.logsigmoid(target_logits(logits, targets))
    return target_logits(logits.log_softmax(1), targets)


@torch.no_grad()
def score(
    model: nn.Module,
    images: Float[Tensor, "B C H W"],
    targets: Int[Tensor, " B"],
    activation: Activation = "softmax",
) -> Float[Tensor, " B"]:
    """Return the log-score of each target: one plain forward."""
    return log_scores(logits_of(model(images)), targets, activation)


def check_inputs(speaker: str, images: Tensor, targets: Tensor) -> None:
    """Refuse what no method can explain; reads shapes only, never values.

    Raises:
        TypeError: If an argument is not a tensor of the right kind.
        ValueError: If a shape is wrong.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"{speaker}: images must be a floating point tensor as the model takes it, got {kind}; "
            "convert and normalise the pictures first."
        )
    if images.ndim != 4:
        raise ValueError(
            f"{speaker}: images must be (B, C, H, W), got {tuple(images.shape)}; use images[None] for a single image."
        )
    if 0 in images.shape:
        raise ValueError(f"{speaker}: images is empty, {tuple(images.shape)}; give at least one image.")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"{speaker}: targets must be an integer tensor of class indices, one per image.")
    if targets.shape != images.shape[:1]:
        raise ValueError(
            f"{speaker}: targets must have shape ({images.shape[0]},), one class index per image, "
            f"got {tuple(targets.shape)}."
        )
    if targets.device != images.device:
        raise ValueError(f"{speaker}: targets are on {targets.device}, images on {images.device}; move them together.")


def check_values(speaker: str, images: Tensor, targets: Tensor, num_classes: int | None = None) -> None:
    """Refuse NaN pictures and targets the head does not have. Waits for the device: never called per window.

    Raises:
        ValueError: If a picture holds NaN or infinity, or a target is out of range.
    """
    if images.device.type == "meta":
        return
    broken, low, high = torch.stack([
        (~images.isfinite()).any().long(), targets.amin().long(), targets.amax().long(),
    ]).tolist()
    if broken:
        raise ValueError(f"{speaker}: images hold NaN or infinite values; clean the pictures first.")
    top = 2 if num_classes == 1 else num_classes
    if low < 0 or (top is not None and high >= top):
        bound = f"0..{top - 1}" if top is not None else "0 and up"
        raise ValueError(f"{speaker}: targets range from {low} to {high}, the model's classes are {bound}.")


# Lend, then give back -------------------------------------------------------------------------------------


@contextmanager
def explaining(model: nn.Module) -> Iterator[nn.Module]:
    """Borrow a model: eval mode, gradients on, inference mode off, eager; all is given back whatever happens.

    Inside, Lightning's inference mode is off, so clone what came out of it before use (``borrowed``). On the way
    out each submodule has its own mode back, buffers their values, and the random generators their state.
    """
    with torch.inference_mode(False), torch.enable_grad():
        if any(lent is model for lent in _LENT.get()):
            yield model
            return
        with ExitStack() as stack:
            stack.enter_context(_keep_rng(model))
            stack.enter_context(_keep_modes(model))
            stack.enter_context(_no_inference_tensors(model))
            stack.enter_context(_keep_buffers(model))
            stack.enter_context(_plain_attention())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            token = _LENT.set((*_LENT.get(), model))
            stack.callback(_LENT.reset, token)
            model.eval()
            yield model


def borrowed(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd accepts: an inference tensor is cloned, even here where the mode is off."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def _keep_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _keep_buffers(model: nn.Module) -> Iterator[None]:
    # `_version` counts in-place writes, so that only buffers that a forward wrote to are copied back.
    kept = [
        (module, name, buffer, buffer._version, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, copy in kept:
                if buffer._version != version:
                    buffer.copy_(copy)
                module._buffers[name] = buffer


@contextmanager
def _keep_rng(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    cpu, cuda = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for device, state in cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _no_inference_tensors(model: nn.Module) -> Iterator[None]:
    # What was created under inference mode (lazy caches, re-assigned buffers) cannot enter autograd.
    swapped: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    for module in model.modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for name, value in list(store.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    clone = value.clone()
                    if isinstance(value, nn.Parameter):
                        clone = nn.Parameter(clone, requires_grad=value.requires_grad)
                    swapped.append((store, name, value, clone))
                    store[name] = clone
    try:
        yield
    finally:
        for store, name, value, clone in swapped:
            if store.get(name) is clone:
                store[name] = value


@contextmanager
def _plain_attention() -> Iterator[None]:
    # Without gradients, attention takes a fused path that skips hooks and differs in the last digits.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Layers ---------------------------------------------------------------------------------------------------


@dataclass
class Tap:
    """What passed through a layer.

    Attributes:
        features: The layer's output, detached, with gradients on: differentiate the head's output by it.
        calls: How often the layer was called.
    """

    features: Tensor | None = None
    calls: int = 0


@contextmanager
def recording(layer: nn.Module) -> Iterator[Tap]:
    """Cut the graph at a layer: run the forward under ``no_grad`` and only what follows the layer is recorded.

    A layer that is called several times is cut at its last call.
    """
    tap = Tap()

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tap.calls += 1
        features = _first_tensor(output).detach().requires_grad_()
        tap.features = features
        torch.set_grad_enabled(True)  # The surrounding no_grad puts the mode back.
        # The clone lets whatever follows work in place: a leaf may not be written to.
        return _with_first_tensor(output, features.clone())

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
        RuntimeError: If the layer never ran, or no gradient can flow from the logits back to it.
    """
    # A backbone inside the model's own `no_grad` switches recording off again on its way out; retried, its
    # surroundings have gradients on.
    for grad in (False, True):
        with recording(layer) as tap, torch.set_grad_enabled(grad):
            logits = logits_of(model(images))
        if tap.features is None:
            raise RuntimeError(
                f"{type(layer).__name__} did not run in the model's forward, so its features are unknown; name a "
                "target_layer that does. Scripted, traced and exported modules cannot be looked into."
            )
        if logits.requires_grad:
            return logits, tap.features
    raise RuntimeError(
        "No gradient flows from the model's logits back to the target layer: the forward detaches it or runs in "
        "its own inference_mode. Name a later target_layer, or remove the detach."
    )


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, (tuple, list)) or isinstance(output, Mapping):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise TypeError(f"A target layer must return a tensor, or a tuple or dict that holds one; got {type(output)}.")


def _with_first_tensor(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    first = _first_tensor(output)
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
    modules = {_plain(name): module for name, module in model.named_modules()}
    if isinstance(target_layer, nn.Module):
        if not any(module is target_layer for module in modules.values()):
            raise ValueError(
                f"target_layer {type(target_layer).__name__} is not a part of this model; give one of its own "
                'modules, or a dotted name such as "layer4".'
            )
        return target_layer
    found = modules.get(_plain(target_layer))
    if found is None or not target_layer:
        near = [name for name in modules if name and name.count(".") < 2]
        raise ValueError(
            f"target_layer {target_layer!r} is unknown; this model has, among others: {', '.join(near[-12:])}. "
            "Leave it out to have one found."
        )
    return found


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")  # torch.compile's wrapper.


def find_target_layer(model: nn.Module, images: Float[Tensor, "B C H W"]) -> nn.Module:
    """Find the last layer whose features still lie on a grid, by one traced forward of one image.

    For a CNN that is the block before global pooling (ResNet's ``layer4``, VGG-16's last ReLU before its last
    pooling). For a transformer it is the last layer whose patch tokens still reach the logits: a class token is
    read at the end, so the very last layers tell nothing about place. The answer is remembered per model.

    Raises:
        ValueError: If no layer keeps a grid.
    """
    modules = dict(model.named_modules())
    remembered = _FOUND.get(model)
    if remembered in modules:
        return modules[remembered]
    with explaining(model):
        name = _last_on_a_grid(model, borrowed(images[:1]))
    _FOUND[model] = name
    return modules[name]


_PASS_THROUGH = (
    nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip


def _last_on_a_grid(model: nn.Module, image: Float[Tensor, "1 C H W"]) -> str:
    names = {module: name for name, module in model.named_modules() if name}
    seen: list[tuple[str, Tensor]] = []
    pooled: list[Tensor] = []  # Held, so that no tensor's identity is used twice.

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        try:
            features = _first_tensor(output)
        except TypeError:
            return
        if isinstance(module, _PASS_THROUGH):
            pooled.append(features)
        elif features.requires_grad and not any(features is tensor for tensor in pooled):
            seen.append((names[module], features))

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_hook(note).remove)
        image = image.detach().requires_grad_()
        logits = logits_of(model(image))
    channels_out = logits.shape[1]
    usable = [
        (name, features)
        for name, features in seen
        if (grid := find_grid(features.shape, image.shape[-2:])) is not None and grid.channels != channels_out
    ]
    probe = _probe(logits, seen)
    for name, features in reversed(usable):
        gradient = torch.autograd.grad(probe, features, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            continue
        grid = find_grid(features.shape, image.shape[-2:])
        if grid is not None and bool((grid.to_maps(gradient) != 0).any()):
            return name
    tried = ", ".join(f"{name} {tuple(f.shape)}" for name, f in seen[-6:])
    raise ValueError(
        f"No layer with spatial features reaches the logits for a {image.shape[-2]}x{image.shape[-1]} image "
        f"(the last ones seen: {tried}). Name target_layer, or use larger images."
    )


def _probe(logits: Tensor, seen: list[tuple[str, Tensor]]) -> Tensor:
    """Return a scalar whose gradient tells what can reach the logits."""
    mix = torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)
    probe = (logits * mix).sum()
    before_head = [features for _, features in seen if features.ndim == 2 and features.shape[1] != logits.shape[1]]
    if not logits.any() and before_head:
        # A head of zeros, as torchvision's ViT has before training, stops every gradient: look in front of it.
        probe = before_head[-1].cumsum(1).sum()
    return probe


@dataclass(frozen=True)
class Grid:
    """How a layer's features lie on the image.

    Attributes:
        layout: ``"channels"`` (B, C, h, w), ``"channels_last"`` (B, h, w, C) or ``"tokens"`` (B, extra + h * w, C).
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
            return features[:, self.extra :].unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)
        return features


def find_grid(shape: tuple[int, ...] | torch.Size, size: tuple[int, int] | torch.Size) -> Grid | None:
    """Read a feature shape as a grid over an image of ``size``, or return None if it is none.

    Channels may come first or last: the reading whose proportions fit the image's wins. Tokens (B, N, C) are read
    with the patch size that leaves the fewest tokens over.
    """
    height, width = size
    if len(shape) == 4:

        def misfit(rows: int, columns: int) -> float:
            ratio = rows * width / (columns * height)
            return max(ratio, 1 / ratio)

        first, last = (shape[2], shape[3]), (shape[1], shape[2])
        readings = [
            (misfit(*grid), layout, *grid, channels)
            for grid, layout, channels in ((first, "channels", shape[1]), (last, "channels_last", shape[3]))
            if grid[0] * grid[1] > 1 and grid[0] <= height and grid[1] <= width
        ]
        if not readings:
            return None
        best = min(readings, key=lambda reading: reading[0])
        return Grid(*best[1:])
    if len(shape) == 3:
        tokens = [
            Grid("tokens", height // p, width // p, shape[2], extra)
            for p in range(2, min(height, width) + 1)
            if 0 <= (extra := shape[1] - (height // p) * (width // p)) <= 32 and (height // p) * (width // p) > 1
        ]
        return min(tokens, key=lambda grid: grid.extra) if tokens else None
    return None


def input_window(model: nn.Module) -> int | None:
    """Return the side of the square input a model was built for, where it says so; None otherwise.

    Read from torchvision's ``image_size``, timm's ``pretrained_cfg`` and Hugging Face's ``config.image_size``, on the
    model or on a wrapped one.
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
        yield cfg.get("input_size")
    config = vars(module).get("config")
    if config is not None and not isinstance(config, Mapping):
        yield getattr(config, "image_size", None)

