"""Finding the last layer of a model whose features lie on the image, by one traced forward pass."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from statistics import median_low
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sess_lightning.introspection.footprints import coverage, read_grid, seen
from sess_lightning.introspection.grids import Grid, find_grid, may_be_grid
from sess_lightning.introspection.hooks import first_tensor, try_gradient, with_first_tensor
from sess_lightning.introspection.logits import classify
from sess_lightning.ops import size_of


class NoPlacesError(ValueError):
    """No layer of a model has features that could lie on the image, as in an MLP."""


class Passage(NamedTuple):
    """One call of a layer.

    Attributes:
        name: Name of the layer.
        features: Its output.
        given: Its first tensor argument, if there is one.
    """

    name: str
    features: Tensor
    given: Tensor | None


class Trace(NamedTuple):
    """One forward pass of one image, with its graph.

    Attributes:
        image: The leaf at the beginning of the graph.
        logits: The end of the graph.
        passages: The layers' calls in order, without those that only pool or pass on.
    """

    image: Float[Tensor, "1 C H W"]
    logits: Float[Tensor, "1 N"]
    passages: list[Passage]

    def calls(self, name: str) -> list[int]:
        """Return the indices of the passages through one layer."""
        return [i for i, passage in enumerate(self.passages) if passage.name == name]


_PASS_THROUGH = (
    nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity, nn.Flatten,
    nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.MaxPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip
_SHUT = torch.jit.ScriptModule
"""Modules that take no hooks."""
_TRIES = 4
"""How many times features of one shape may be found to lie on no grid before that shape is given up."""


def trace(model: nn.Module, image: Float[Tensor, "1 C H W"], wanted: nn.Module | None = None) -> Trace:
    """Run one forward pass with a graph from the image to the logits.

    Args:
        model: As ``explaining`` lends it.
        image: A copy that may become a leaf.
        wanted: A layer that is recorded even if it only passes on.
    """
    names = {part: name for name, part in model.named_modules() if name and not isinstance(part, _SHUT)}
    passages: list[Passage] = []
    passed: list[tuple[Tensor, int]] = []  # Kept alive, so that no tensor's id is used twice.

    def note(module: nn.Module, inputs: Any, output: Any) -> Any:
        try:
            features = first_tensor(output)
        except TypeError:
            return output
        # An inference tensor has no graph, nor a version.
        if isinstance(module, _PASS_THROUGH) and module is not wanted and not features.is_inference():
            passed.append((features, features._version))
            return output
        # If it was written to afterwards, as by an in-place activation, it is features again.
        merely_passed = any(features is tensor and features._version == v for tensor, v in passed)
        if (merely_passed and module is not wanted) or not features.requires_grad:
            return output
        # The copy is read by what follows the layer, not by what the layer itself computes from it: Hugging
        # Face's backbones return features and a pooled output, and the head reads the latter.
        features = features.clone()
        given = next((each for each in inputs if isinstance(each, Tensor) and each.requires_grad), None)
        passages.append(Passage(names[module], features, given))
        return with_first_tensor(output, features)

    def record(_module: nn.Module, _inputs: Any) -> None:
        torch.set_grad_enabled(True)  # Even where the model's own `no_grad` surrounds a frozen backbone.

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(record).remove)
            stack.callback(module.register_forward_hook(note).remove)
        return Trace(image, classify(model, image.requires_grad_().clone()), passages)


def search(
    model: nn.Module, image: Float[Tensor, "1 C H W"], stated: Grid | None = None
) -> tuple[str, dict[int, Grid]]:
    """Find the last layer whose features still lie on a grid; return its name and its calls' grids, by index.

    For a CNN that is the block before global pooling (ResNet's ``layer4``, VGG-16's last ReLU before its last
    pooling). For a transformer it is the last layer, keys and values aside, whose patch tokens still reach
    the logits: the head reads a class token, so the very last layers say nothing about place (ViT: the last
    block's ``norm1``).

    Args:
        model: As ``explaining`` lends it.
        image: A copy that may become a leaf.
        stated: The grid that the layer must have, which is not checked.

    Raises:
        NoPlacesError: If no layer's features could lie on a grid.
        ValueError: If none does, or the model crops or pads the image inside.
    """
    reader = _Reader(trace(model, image), stated)
    if stated is None:
        reader.check_coverage()
    second_choice, modules = None, dict(model.named_modules())
    for place in reversed(range(len(reader.passages))):
        grids = reader.grids(place)
        if not grids:
            continue
        name = reader.passages[place].name
        if not reader.is_side_road(place, modules[name]) and not reader.is_class_map(place):
            return name, grids
        second_choice = second_choice or (name, grids)
    if second_choice is not None:
        return second_choice
    raise reader.nothing_found()


def place_layer(
    model: nn.Module, layer: nn.Module, image: Float[Tensor, "1 C H W"], stated: Grid | None = None
) -> dict[int, Grid]:
    """Return the grids of a layer's calls, by index; empty if they lie on none.

    Of calls in sequence, the last that reaches the logits is read; of calls in parallel, as in a model that
    sums several views of the image, all are read.
    """
    reader = _Reader(trace(model, image, layer), stated)
    if stated is None:
        reader.check_coverage()
    places = reader.traced.calls(next(name for name, module in model.named_modules() if module is layer))
    for place in reversed(places):
        if reader.reached(place) is not None:
            return reader.grids(place)
    # A model without gradients, as with a head of zeros: its map is flat wherever it is read.
    grid = reader.read(places[-1]) if places else None
    return {} if grid is None else {places[-1]: grid}


class _Reader:
    """Reads grids off a trace, each passage once."""

    def __init__(self, traced: Trace, stated: Grid | None) -> None:
        self.traced, self.stated = traced, stated
        self.passages, self.image = traced.passages, traced.image
        self.probe = _probe(traced)
        self._known: dict[int, Grid | None] = {}
        self._failures: Counter[torch.Size] = Counter()

    def reached(self, place: int) -> Tensor | None:
        """Return the gradient of the logits at a passage, or None if they do not depend on it."""
        slope = try_gradient(self.probe, self.passages[place].features)
        return slope if slope is not None and slope.any() else None

    def grids(self, place: int) -> dict[int, Grid]:
        """Return the grids of a passage and of the parallel ones through its layer, by the call's index."""
        if self._grid(place) is None:
            return {}
        calls = self.traced.calls(self.passages[place].name)
        grids = {calls.index(each): self._grid(each) for each in calls if self._is_beside(each, place)}
        known = {call: grid for call, grid in grids.items() if grid is not None}
        same_shape = len({grid.shape for grid in known.values()}) == 1
        return known if len(known) == len(grids) and same_shape else {}

    def _is_beside(self, one: int, other: int) -> bool:
        if one == other:
            return True
        earlier, later = (self.passages[place].features for place in sorted((one, other)))
        follows = try_gradient(later.float().sum(), earlier) is not None
        depends = try_gradient(self.passages[one].features.float().sum(), self.image)
        return not follows and depends is not None and self.reached(one) is not None

    def _grid(self, place: int) -> Grid | None:
        if place not in self._known:
            reached = self.reached(place)
            self._known[place] = None if reached is None else self._read_reached(place, reached)
        return self._known[place]

    def _read_reached(self, place: int, reached: Tensor) -> Grid | None:
        usual = find_grid(tuple(reached.shape), size_of(self.image))
        if self.stated is None and usual is not None and not usual.to_maps(reached).any():
            return None  # As where only a class token is read: no need to look further.
        grid = self.read(place)
        return grid if grid is not None and grid.to_maps(reached).any() else None

    def read(self, place: int) -> Grid | None:
        """Return the grid of a passage, whether or not the logits depend on it."""
        features = self.passages[place].features
        if self.stated is not None:
            return self.stated if self.stated.fits(tuple(features.shape), 1) else None
        if not may_be_grid(tuple(features.shape)) or self._failures[features.shape] >= _TRIES:
            return None
        grid = read_grid(features, self.image)
        self._failures[features.shape] += grid is None
        return grid

    def is_side_road(self, place: int, module: nn.Module) -> bool:
        """Return whether places also reach the logits past this layer, as they do past keys or values.

        Keys and values are parts of the attention that reads a place, not its features. A linear layer on
        tokens, even if an adapter wraps it, is taken for one of them.
        """
        grid, (_, features, given) = self._known[place], self.passages[place]
        if grid is None or grid.is_plane:
            return False
        if _is_linear(module):
            return True
        if given is None or not grid.fits(given.shape, 1):
            return False
        all_ways = try_gradient(self.probe, given)
        through = try_gradient(features, given, self.reached(place))
        if all_ways is None or through is None:
            return False
        past = grid.to_maps(all_ways - through).abs().amax()
        return bool(past > 1e-4 * grid.to_maps(all_ways).abs().amax())  # Beyond rounding.

    def is_class_map(self, place: int) -> bool:
        """Return whether features are the logits before pooling: each logit depends on its own channel."""
        grid, logits = self._known[place], self.traced.logits
        if grid is None or grid.channels != logits.shape[1]:
            return False
        reached = try_gradient(logits[0, 0], self.passages[place].features)
        return reached is not None and not grid.to_maps(reached)[:, 1:].any()

    def check_coverage(self) -> None:
        """Refuse a model that crops the image, or pads it with a margin.

        The first layer shows it, since its cells see few pixels.

        Raises:
            ValueError: If its cells do not span the image.
        """
        first = next(
            (one for one in self.passages if one.features.ndim == 4 and len(one.features) == 1), None
        )
        spans = None if first is None else coverage(first.features, self.image)
        if first is None or spans is None:
            return
        pixels = seen(first.features, self.image)
        for (start, end), (low, high), cells in zip(spans, pixels, first.features.shape[2:], strict=True):
            slack = max(1 / 24, 0.5 / cells)  # Small kernels with large strides are off centre.
            # Without padding the outermost cells lie further inside, but see the outermost pixels.
            left, right = min(start, low), max(end, high)
            if abs(left) < slack and -2 * slack < right - 1 < slack:
                continue
            rows, columns = (f"{max(0, start):.0%} to {end:.0%}" for start, end in spans)
            raise ValueError(
                "The model crops, pads or moves the image in its forward: its first layer, "
                f"{first.name}, spans {rows} of the height and {columns} of the width, so a map would not "
                "line up with the image. Do this before the model is called, or state the layer's grid: "
                "target_layer=OnGrid(name, Grid(...))."
            )

    def nothing_found(self) -> ValueError:
        """Return why no layer was found, and a remedy."""
        if not self.passages:
            return ValueError(
                "No layer's features reach the logits with a gradient: the module is traced, exported or "
                "scripted and cannot be looked into, or its forward detaches them or runs in "
                "inference_mode. Explain the module that it was made of, change the forward, or use a method "
                "without gradients: RISE()."
            )
        tried = ", ".join(f"{name} {tuple(features.shape)}" for name, features, _ in self.passages[-6:])
        height, width = size_of(self.image)
        text = (
            f"No layer with spatial features reaches the logits for a {height}x{width} image (the last ones "
            f"seen: {tried}). Name target_layer, state its grid with OnGrid(name, Grid(...)), use larger "
            "images, or a method that needs no layer, such as SESS(Gradient())."
        )
        runs = median_low(Counter(passage.name for passage in self.passages).values())
        if runs > 1:  # Of most layers: activations are often shared.
            text += f" Most layers run {runs} times a forward pass, perhaps on views that no one map shows."
        spatial = any(may_be_grid(tuple(features.shape)) for _, features, _ in self.passages)
        return ValueError(text) if spatial else NoPlacesError(text)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, or an adapter's sum of such."""
    if isinstance(module, nn.Linear):
        return True
    parts = [part for part in module.modules() if not any(True for _ in part.children())]
    neutral = (nn.Dropout, nn.Identity, nn.ModuleDict, nn.ModuleList, nn.ParameterDict)
    return any(isinstance(part, nn.Linear) for part in parts) and all(
        isinstance(part, (nn.Linear, *neutral)) for part in parts
    )


def _probe(traced: Trace) -> Float[Tensor, ""]:
    """Return a scalar whose gradient shows what can reach the logits."""
    logits = traced.logits
    mix = torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)
    before_head = [
        tensor
        for _, features, given in traced.passages
        for tensor in (given, features)
        if tensor is not None and tensor.ndim == 2 and tensor.shape[1] != logits.shape[1]
    ]
    probe = (logits * mix).sum()
    slope = try_gradient(probe, traced.image) if before_head else None
    if slope is not None and not slope.any():
        # A head of zeros, as in an untrained torchvision ViT, stops every gradient: look in front of it.
        return before_head[-1].cumsum(1).sum()
    return probe
