"""Models sharded by FSDP2: their parameters are gathered once, then nothing communicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold all parameters of a sharded model; every rank must enter together.

    Inside, forward and backward passes gather nothing, so that ranks may run different numbers of them. The
    whole model must fit on each device. Afterwards, everything that was sharded before is sharded again. A
    model that is not sharded is left as it is.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
                stack.enter_context(_held(module))
        yield


@contextmanager
def _held(module: Any) -> Iterator[None]:
    state = module._get_fsdp_state()
    groups = groups_of(state)
    held = [group.is_unsharded for group in groups]
    module.unshard()
    owners = [state, getattr(state, "_state_ctx", None), *groups]
    owners += [getattr(group, "comm_ctx", None) for group in groups]
    notes = [_Note(owner) for owner in owners if owner is not None]
    state._auto_reshard_after_forward = False
    for group in groups:
        group.post_forward_mesh_info, group.reshard_after_backward = None, False
    try:
        yield
    finally:
        for note in notes:
            note.put_back()
        for group, was_held in zip(groups, held, strict=True):
            if not was_held:
                group.reshard()


def groups_of(state: Any) -> list[Any]:
    """Return what FSDP gathers at once of a module, by its state: none, one or several groups."""
    several = getattr(state, "_fsdp_param_groups", None)
    return [
        group for group in ([state._fsdp_param_group] if several is None else several) if group is not None
    ]


class _Note:
    """FSDP's state of passes under way: the order of modules, and queued callbacks.

    A pass of the explanation that fails, or that only one rank runs, must not change it: the order of the
    next training step's collectives depends on it.
    """

    def __init__(self, owner: Any) -> None:
        self._owner, self._values = owner, dict(vars(owner))
        self._lists = [(value, list(value)) for value in self._values.values() if isinstance(value, list)]

    def put_back(self) -> None:
        vars(self._owner).update(self._values)
        for values, before in self._lists:
            values[:] = before
