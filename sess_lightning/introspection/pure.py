"""Models whose forward pass, in evaluation mode, is known to change nothing and to draw nothing."""

from __future__ import annotations

from functools import cache
from operator import itemgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.modules.lazy import LazyModuleMixin

from sess_lightning.introspection.copies import PLAIN_TENSORS

_TORCHS = (
    "activation", "batchnorm", "channelshuffle", "container", "conv", "dropout", "flatten", "fold",
    "instancenorm", "linear", "module", "normalization", "padding", "pixelshuffle", "pooling", "upsampling",
)  # fmt: skip
"""Files of torch's layers. Embeddings may scale their weights, recurrent layers lay theirs out anew."""
_TORCHVISIONS = (
    "models.alexnet", "models.convnext", "models.densenet", "models.efficientnet", "models.googlenet",
    "models.inception", "models.maxvit", "models.mnasnet", "models.mobilenetv2", "models.mobilenetv3",
    "models.regnet", "models.resnet", "models.shufflenetv2", "models.squeezenet", "models.swin_transformer",
    "models.vgg", "models.vision_transformer", "ops.misc", "ops.stochastic_depth",
)  # fmt: skip
_KNOWN = {f"torch.nn.modules.{name}" for name in _TORCHS} | {f"torchvision.{name}" for name in _TORCHVISIONS}
_EXCEPT = (LazyModuleMixin, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
"""Those that change, and those that pool at random."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks = itemgetter(*_HOOKS)
_hooks_of_all = itemgetter(*(f"_global{kind}" for kind in _HOOKS))


def pure_modules(model: nn.Module) -> list[nn.Module] | None:
    """Return a model's modules; None if its forward pass may change it, or draw random numbers.

    All modules have to be torch's layers or those of torchvision's classifiers, without hooks and without
    methods of their own, and all tensors plain ones that autograd takes.
    """
    modules = [*model.modules()] if not any(_hooks_of_all(vars(all_modules))) else []
    for module in modules:
        kind: Any = type(module)
        attributes, methods = vars(module), _methods(kind)
        if methods is None or not methods.isdisjoint(attributes) or any(_hooks(attributes)):
            return None
        for tensor in (*attributes["_parameters"].values(), *attributes["_buffers"].values()):
            if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.is_inference()):
                return None
    return modules or None


@cache
def _methods(kind: Any) -> frozenset[str] | None:
    """Return the names that no instance may have of its own, those of its class; None if it is not known."""
    if kind.__module__ not in _KNOWN or issubclass(kind, _EXCEPT):
        return None
    return frozenset(dir(kind)) if kind.forward.__module__ in _KNOWN else None  # It may have been patched.
