"""Excitation backprop: the target's evidence, passed down as winning probabilities."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from sess_lightning.introspection.hooks import gradients
from sess_lightning.introspection.layers import TargetLayer, read_features, resolve_layer
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import log_scores
from sess_lightning.methods.evidence import logit
from sess_lightning.methods.templates import ExtractingMethod
from sess_lightning.ops import full_precision, min_max_upsampled, size_of
from sess_lightning.types import Activation, Extraction

_Run: TypeAlias = Callable[[Tensor], Tensor]
_FLOOR = 1e-20  # A neuron that is excited less passes nothing on.


def _share(run: _Run, x: Tensor, p: Tensor) -> Tensor:
    """Pass each output's ``p`` to the inputs by their shares of ``run(x)``, a sum of non-negative parts."""
    with torch.enable_grad():
        x = x.clamp(min=0).requires_grad_()
        total = run(x)
    excited = total > _FLOOR
    (pulled,) = torch.autograd.grad(total, x, torch.where(excited, p / total.where(excited, 1), 0))
    return x.detach() * pulled


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _Run, excited: _Run, inhibited: _Run | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.excited, ctx.inhibited = excited, inhibited
        return run(x)

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor, None, None, None]:
        x = ctx.saved_tensors[0].detach()
        if ctx.inhibited is None:
            return _share(ctx.excited, x, p), None, None, None
        # Evidence against a neuron comes in through its negative weights.
        won = _share(ctx.excited, x, p.clamp(min=0)) + _share(ctx.inhibited, x, (-p).clamp(min=0))
        return won, None, None, None


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _Run) -> Tensor:
        y = run(x)
        if y is x:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return p, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        mine, other = x.clamp(min=0), y.clamp(min=0)
        total = mine + other
        excited = total > _FLOOR
        total = total.where(excited, 1)
        ctx.save_for_backward((mine / total).where(excited, 0), (other / total).where(excited, 0))
        z = run(x, y)
        if z is x:
            ctx.mark_dirty(x)
        return z

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor, Tensor, None]:
        mine, other = ctx.saved_tensors
        return p * mine, p * other, None


class excitation(TorchFunctionMode):  # noqa: N801
    """Inside, the gradients of what runs are winning probabilities; nothing is hooked or replaced.

    Convolutions, linear layers and averages share a probability out in proportion to input times positive
    weight; sums, in proportion to their positive terms. Activations and norms pass it on whole; so do
    products, to their larger factor (the smaller one is a gate). Everything else, including maximum pooling,
    keeps its own gradient.
    """

    _WEIGHTED = frozenset({F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d})
    _AVERAGES = frozenset(
        {
            F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d, torch.mean, Tensor.mean, torch.sum, Tensor.sum,
        }
    )  # fmt: skip
    _PASSING = frozenset(
        {
            F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.relu, F.relu_, torch.relu,
            torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu,
            F.hardswish,
        }
    )  # fmt: skip
    _SUMS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__})
    _PRODUCTS = frozenset(
        {
            torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__, torch.div,
            Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__,
        }
    )  # fmt: skip

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply the rules to known functions, and pass everything else through."""
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        tensors = [value for value in (*args[:2], *kwargs.values()) if isinstance(value, Tensor)]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return func(*args, **kwargs)

        def run(x: Tensor) -> Tensor:
            output: Tensor = func(x, *args[1:], **{name: kwargs[name] for name in kwargs if name != "input"})
            return output

        if func in self._WEIGHTED:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            settings = {name: kwargs[name] for name in kwargs if name not in ("input", "weight", "bias")}

            def weighted(sign: int, x: Tensor) -> Tensor:
                output: Tensor = func(x, (sign * weight.detach()).clamp(min=0), None, *args[3:], **settings)
                return output

            return _Shared.apply(x, run, partial(weighted, 1), partial(weighted, -1))
        if func in self._AVERAGES:
            return _Shared.apply(x, run, run, None)
        if func in self._PASSING or (func in self._PRODUCTS and len(tensors) == 1):
            return _Passed.apply(x, run)
        if len(args) == 2 and not kwargs and len(tensors) == 2 and func in self._SUMS | self._PRODUCTS:
            return self._pair(func, *args)
        return func(*args, **kwargs)

    def _pair(self, func: Callable[..., Tensor], x: Tensor, y: Tensor) -> Any:
        if func in self._SUMS:
            return _Added.apply(x, y, func) if x.shape == y.shape else func(x, y)
        if x.numel() >= y.numel():
            return _Passed.apply(x, lambda x: func(x, y.detach()))
        return _Passed.apply(y, lambda y: func(x.detach(), y))


@dataclass(frozen=True)
class ExcitationBackprop(ExtractingMethod):
    """Excitation backprop (Zhang et al., ECCV 2016; IJCV 2018): marginal winning probabilities.

    The target's neuron wins with probability 1; each winner passes its probability to the inputs of its layer
    in proportion to input times positive weight, down to ``target_layer``, where channels are summed. Written
    for networks of convolutions, linear layers, pooling, norms and ReLUs, with shortcuts; elsewhere, above
    all in attention, the plain gradient is used instead and no claim is made.

    As in TorchRay, norms pass everything on. Unlike in TorchRay, a negative input wins nothing, in sums
    either (the paper assumes non-negative inputs; linear bottlenecks have others), and bounded ReLUs and
    gates pass everything on: so probabilities stay probabilities. The contrastive variant subtracts the map
    of the negated target and rectifies; both are linear below the classifier, so taking the difference at the
    end is taking it there, as the authors do.

    Costs one forward pass, and a backward pass through the head (two, if contrastive), which is its own
    forward pass again on positive weights.

    Attributes:
        target_layer: The layer where the map is read, as for ``GradCAM``. The paper reads it lower: VGG-16's
            ``features.23``, ResNet-50's ``layer3``.
        contrastive: Subtract the evidence against the target.
        activation: How the model's logits become probabilities.

    >>> ExcitationBackprop()(model, images, targets).shape
    torch.Size([1, 64, 64])
    """

    target_layer: TargetLayer = None
    contrastive: bool = False
    activation: Activation = "softmax"
    single_forward: ClassVar[bool] = True

    def extract(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> Extraction:
        """Return maps on the layer's grid, and log-scores, from one forward pass."""
        with explaining(model):
            winning, logits = self.winning(model, images, targets)
            with torch.no_grad(), full_precision(images.device):
                maps, _ = min_max_upsampled(winning.sum(1).relu(), size_of(images))
                return Extraction(maps, log_scores(logits, targets, self.activation))

    def winning(
        self, model: nn.Module, images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B N"]]:
        """Return each neuron's marginal winning probability (or the difference of two), and the logits."""
        with explaining(model):
            resolve_layer(model, self.target_layer, images)  # The search uses plain gradients.
            with excitation():
                logits, features, site = read_features(model, self.target_layer, images)
            wins = logit(logits.detach(), targets)
            won = site.to_maps(gradients(logits, features, wins, retain_graph=self.contrastive))
            if self.contrastive:
                won = won - site.to_maps(gradients(logits, features, -wins))
            return won.to(torch.float32), logits.detach()
