"""Folding batch norms into convolutions."""

from __future__ import annotations

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode whose batch norms are folded into the convolutions before them.

    Its outputs agree to rounding. Modules keep their names; a folded batch norm is an ``nn.Identity``.

    Raises:
        ValueError: If the model's forward cannot be traced, so that the order of its layers is unknown.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"The model cannot be folded, its forward cannot be traced: {error}") from error
    modules: dict[str, nn.Module] = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        once = calls.count(str(before.target)) == calls.count(str(node.target)) == 1
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and once:
            model.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            model.set_submodule(str(node.target), nn.Identity())
    return model
