"""Gradients of the target's logit with respect to the pixels."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from sess_lightning.introspection.hooks import gradient
from sess_lightning.introspection.lending import borrowed, explaining
from sess_lightning.introspection.logits import check_inputs, classify, log_scores, score, target_logits
from sess_lightning.methods.templates import ExtractingMethod, MapMethod, WrappingMethod, in_parts, is_small
from sess_lightning.ops import min_max, upper_percentile
from sess_lightning.types import Activation, Extraction, SaliencyMethod


class PixelMethod(ExtractingMethod):
    """A method that returns raw maps, before they are stretched to [0, 1].

    ``SmoothGrad`` averages these, as its paper does.
    """

    @abstractmethod
    def raw(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B H W"], Float[Tensor, " B"]]:
        """Return maps of any range and log-scores; the model and the tensors are borrowed already."""

    def raw_maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return what ``raw`` returns without log-scores: a method saves what these alone cost."""
        return self.raw(model, images, targets)[0]

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the maps alone: no forward pass for scores that nobody reads."""
        check_inputs(type(self).__name__, images, targets)
        with explaining(model):
            targets = borrowed(targets)
            if is_small(images):
                maps = self.raw_maps(model, borrowed(images), targets)
            else:
                parts = in_parts(lambda rows, which: self.raw_maps(model, rows, targets[which]), images)
                maps = torch.cat(parts)
            with torch.no_grad():
                return self.finish(maps)

    def finish(self, maps: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
        """Turn raw maps into final ones."""
        return min_max(maps)

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return finished maps, and log-scores."""
        with explaining(model):
            maps, logs = self.raw(model, images, targets)
            with torch.no_grad():
                return Extraction(self.finish(maps), logs)


def pixel_gradients(
    model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B N"]]:
    """Return the gradient of each target's logit with respect to its image, float32, and the logits.

    Raises:
        RuntimeError: If no gradient flows from the logits back to the pixels.
    """
    pixels = images.detach().requires_grad_()
    logits = classify(model, pixels.clone())
    return gradient(target_logits(logits, targets), pixels).to(torch.float32), logits.detach()


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a method's own random generator; the global one is never touched."""
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Gradient(PixelMethod):
    """Saliency maps of Simonyan et al. (2013): the maximum over channels of |gradient of the target's logit|.

    Costs one forward pass and one backward pass to the pixels.

    Attributes:
        activation: How the model's logits become probabilities.

    >>> Gradient()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    activation: Activation = "softmax"

    def raw(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B H W"], Float[Tensor, " B"]]:
        """Return the gradient's largest channel, and log-scores."""
        gradients, logits = pixel_gradients(model, images, targets)
        return gradients.abs().amax(1), log_scores(logits, targets, self.activation)


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, in_place: bool) -> Tensor:
        # The mask, not the output, is saved: what follows may write into the output.
        ctx.save_for_backward((x > 0) & (x < top))
        if in_place:
            ctx.mark_dirty(x)
            return x.clamp_(0, top)
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (passed,) = ctx.saved_tensors
        return grad.clamp(min=0) * passed, None, None


class guided_relu(TorchFunctionMode):  # noqa: N801
    """Inside, every ReLU and ReLU6 lets only positive gradients back, however the model calls it.

    Nothing is hooked or replaced on the model, so ReLUs that are functions, reused or in-place are guided
    too. Other activations (GELU, SiLU, Hardswish) keep their own gradient, as in the original method.
    """

    _PLAIN = frozenset({F.relu, torch.relu, Tensor.relu})
    _IN_PLACE = frozenset({F.relu_, torch.relu_, Tensor.relu_})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Guide ReLUs, pass everything else through."""
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if func in self._PLAIN or func in self._IN_PLACE:
            in_place = func in self._IN_PLACE or _argument(args, kwargs, 1, "inplace", False)
            return _GuidedReLU.apply(x, float("inf"), in_place)
        if func is F.relu6:
            return _GuidedReLU.apply(x, 6.0, _argument(args, kwargs, 1, "inplace", False))
        if func is F.hardtanh and _argument(args, kwargs, 1, "min_val", -1.0) == 0:
            top = float(_argument(args, kwargs, 2, "max_val", 1.0))
            return _GuidedReLU.apply(x, top, _argument(args, kwargs, 3, "inplace", False))
        return func(*args, **kwargs)


def _hides_relus(module: nn.Module) -> bool:
    """Return whether a module runs ReLUs where no function mode sees them: scripted, traced or exported."""
    if isinstance(module, torch.jit.ScriptModule):
        names = [node.kind() for node in module.inlined_graph.nodes()] if hasattr(module, "forward") else []
    elif isinstance(module, torch.fx.GraphModule):
        names = [str(node.target) for node in module.graph.nodes if isinstance(node.target, OpOverload)]
    else:
        return False
    return any("relu" in name or "hardtanh" in name for name in names)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


@dataclass(frozen=True)
class GuidedBackprop(PixelMethod):
    """Guided backpropagation (Springenberg et al., 2015): the sum of |gradient| over channels.

    Values above the map's 99th percentile are clipped, as the paper's authors draw it. Their code drops its
    hooks after the first window, so that all later windows are plain gradients; here every window is guided.

    Attributes:
        percentile: The percentile above which a map is clipped; 100 clips nothing.
        activation: How the model's logits become probabilities.

    >>> GuidedBackprop()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    percentile: float = 99.0
    activation: Activation = "softmax"

    def raw(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B H W"], Float[Tensor, " B"]]:
        """Return the sum over channels, and log-scores: one forward pass, one backward pass to the pixels.

        Raises:
            RuntimeError: If no gradient flows from the logits back to the pixels, or the model checkpoints,
                or is scripted, traced or exported.
        """
        if any(map(_hides_relus, model.modules())):
            raise RuntimeError(
                "GuidedBackprop: the model is scripted, traced or exported, and its ReLUs cannot be guided; "
                "explain the module that it was made of, or use Gradient()."
            )
        pixels = images.detach().requires_grad_()
        with guided_relu():
            logits = classify(model, pixels.clone())
        try:
            gradients = gradient(target_logits(logits, targets), pixels)
        except CheckpointError as error:
            raise RuntimeError(
                "GuidedBackprop: the model checkpoints its activations, and the backward computes them anew "
                "where they cannot be guided; switch checkpointing off in eval mode."
            ) from error
        return gradients.to(torch.float32).abs().sum(1), log_scores(logits.detach(), targets, self.activation)

    def finish(self, maps: Float[Tensor, "B H W"]) -> Float[Tensor, "B H W"]:
        """Clip outliers, then stretch."""
        return min_max(maps.clamp(max=upper_percentile(maps, self.percentile)[:, None, None]))


@dataclass(frozen=True)
class IntegratedGradients(PixelMethod):
    """Integrated gradients (Sundararajan et al., ICML 2017): the sum of |attribution| over channels.

    An attribution is the image less its baseline, times the mean gradient of the target's logit on the
    straight line between the two. The mean is a Gauss-Legendre sum, as in captum's default; the authors' code
    takes equal steps, and needs several times as many for the same completeness error. Written here because
    XRAI and SESS call it on batches: captum expands a batch by all steps at once, or handles them one by one.

    Costs ``steps`` forward passes and as many backward passes to the pixels; scores cost one more.

    Attributes:
        steps: Points on the line.
        baseline: The value of every pixel where the line begins; 0 is the mean of normalised images.
        batch_size: How many points go through the model at once; never fewer than one per image.
        activation: How the model's logits become probabilities.

    >>> IntegratedGradients(steps=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    steps: int = 50
    baseline: float = 0.0
    batch_size: int = 32
    activation: Activation = "softmax"
    scores_apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_counts("steps", "batch_size")

    @property
    def forwards(self) -> int:  # type: ignore[override]
        """One per step."""
        return self.steps

    def attributions(
        self,
        model: nn.Module,
        images: Float[Tensor, "B C H W"],
        targets: Int[Tensor, " B"],
        baselines: Float[Tensor, "B C H W"],
    ) -> Float[Tensor, "B C H W"]:
        """Return signed attributions; over an image they sum to its logit minus its baseline's."""
        with explaining(model):
            images, baselines, targets = borrowed(images), borrowed(baselines), borrowed(targets)
            line = images - baselines
            total = torch.zeros_like(line, dtype=torch.float32)
            nodes, weights = _gauss_legendre(self.steps, images.device)
            for part, weight in zip(*self._parts(nodes, weights, len(images)), strict=True):
                points = baselines + part.to(line.dtype).view(-1, 1, 1, 1, 1) * line
                gradients, _ = pixel_gradients(model, points.flatten(0, 1), targets.repeat(len(part)))
                total += torch.tensordot(weight, gradients.unflatten(0, points.shape[:2]), 1)
        return total * line.to(torch.float32)

    def _parts(self, nodes: Tensor, weights: Tensor, images: int) -> tuple[tuple[Tensor, ...], ...]:
        size = max(1, self.batch_size // images)
        return nodes.split(size), weights.split(size)

    def raw(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B H W"], Float[Tensor, " B"]]:
        """Return the sum over channels, and log-scores."""
        maps = self.raw_maps(model, images, targets)
        return maps, score(model, images, targets, self.activation)

    def raw_maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the sum over channels."""
        baselines = torch.full_like(images, self.baseline)
        return self.attributions(model, images, targets, baselines).abs().sum(1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _gauss_legendre(count: int, device: torch.device) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Return nodes in [0, 1] and weights that sum to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    # Float32 on the host: not every device has float64.
    places, shares = (torch.from_numpy(values / 2).float() for values in (nodes + 1, weights))
    return places.to(device), shares.to(device)


@dataclass(frozen=True)
class SmoothGrad(MapMethod, WrappingMethod):
    """SmoothGrad (Smilkov et al., 2017) around any method: the mean of the maps of noisy copies.

    Around ``Gradient``, ``GuidedBackprop`` and ``IntegratedGradients`` raw maps are averaged, as in the
    paper; any other method gives its maps in [0, 1]. The paper leaves open whether gradients or magnitudes
    are averaged; here it is the base's maps, so magnitudes. One sample without noise is the base itself.
    All images of a batch meet the same noise, so that none depends on the others.

    Costs ``num_samples`` times the base; scores cost one forward pass more.

    Attributes:
        base: The method to smooth.
        num_samples: Noisy copies.
        noise: Standard deviation of the noise, as a share of the image's range (the paper: 0.1 to 0.2).
        seed: Seed of its own generator; the global one is never touched.
        batch_size: How many copies the base is given at once; never fewer than one per image.

    >>> SmoothGrad(Gradient(), num_samples=2)(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    base: SaliencyMethod
    num_samples: int = 25
    noise: float = 0.15
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        self.check_base("Gradient()")
        self.check_counts("num_samples", "batch_size")
        if not self.noise >= 0:
            raise ValueError(f"SmoothGrad: noise must not be negative, got {self.noise}.")

    def count_forwards(self, model: nn.Module, size: tuple[int, int]) -> int:
        """Return how many forward passes one map of an image of ``size`` (height, width) costs."""
        return self.num_samples * self.base.count_forwards(model, size)

    def maps(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H W"]:
        """Return the mean of the maps of noisy copies; scores are those of the clean images."""
        base, total = self.base, torch.zeros_like(images[:, 0], dtype=torch.float32)
        draw = base.raw_maps if isinstance(base, PixelMethod) else base
        for copies in self._copies(images):
            maps = draw(model, copies.flatten(0, 1), targets.repeat(len(copies)))
            total += maps.unflatten(0, copies.shape[:2]).sum(0)
        mean = total / self.num_samples
        return base.finish(mean) if isinstance(base, PixelMethod) else min_max(mean)

    def _copies(self, images: Float[Tensor, "B C H W"]) -> Iterator[Float[Tensor, "S B C H W"]]:
        source = generator(images.device, self.seed)
        sigma = self.noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
        size = max(1, self.batch_size // len(images))
        for start in range(0, self.num_samples, size):
            # Drawn one by one: the noise must not depend on how many are made at once.
            noise = [
                torch.randn(images.shape[1:], generator=source, device=images.device)
                for _ in range(start, min(start + size, self.num_samples))
            ]
            yield images + sigma * torch.stack(noise)[:, None].to(images.dtype)
