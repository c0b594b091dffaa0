"""Everything a training holds, noted after every step, so that two trainings can be compared in full."""

import hashlib
import random

import numpy as np
import torch
from lightning.pytorch import Callback

from holdings import reading
from precision import precision_flags


def _print(value):
    """A short string that differs whenever the value does."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha1(raw).hexdigest()}"
    return repr(value)


def snapshot(trainer, module, batch=None):
    """Return name -> print of all that a training step reads or writes."""
    found = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "attention's fast path": torch.backends.mha.get_fastpath_enabled(),
        "precision": precision_flags(),
        "threads": torch.get_num_threads(),
        "compiler": torch._dynamo.eval_frame._stance.stance,
        "python's generator": hash(random.getstate()),
        "numpy's generator": hash(np.random.get_state()[1].tobytes()),  # noqa: NPY002
        "torch's generator": torch.get_rng_state(),
        "global step": trainer.global_step,
    }
    if batch is not None:
        found["batch"] = batch[0]
    for name, each in module.named_modules():
        found |= {
            f"{name} mode": each.training,
            f"{name} attributes": sorted(vars(each)),
            f"{name} hooks": [
                len(hooks) for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks)
            ],
        }
    for name, each in module.named_parameters():
        found |= {
            name: each,
            f"{name} gradient": each.grad,
            f"{name} requires gradient": each.requires_grad,
            f"{name} hooks": len(each._backward_hooks or ()),
        }
    found |= dict(module.named_buffers())
    found["held"] = reading(getattr(module, "held", None))
    for i, optimizer in enumerate(trainer.optimizers):
        for j, group in enumerate(optimizer.param_groups):
            found |= {f"{i} {j} {key}": value for key, value in group.items() if key != "params"}
            for k, parameter in enumerate(group["params"]):
                state = optimizer.state.get(parameter, {})
                found |= {f"{i} {j} {k} {key}": value for key, value in state.items()}
    metrics = trainer.callback_metrics.items()
    found |= {f"metric {key}": value for key, value in metrics if not key.startswith("sess")}
    return {name: _print(value) for name, value in found.items()}


class Ledger(Callback):
    """Takes a snapshot wherever the callback has just been, and around every step."""

    def __init__(self):
        self.pages = []

    def _note(self, event, trainer, module, batch=None):
        self.pages.append((event, snapshot(trainer, module, batch)))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._note("before a step", trainer, module, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self._note("after a step", trainer, module, batch)

    def on_validation_epoch_start(self, trainer, module):
        self._note("validation begins", trainer, module)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self._note("after a validation batch", trainer, module, batch)

    def on_validation_epoch_end(self, trainer, module):
        self._note("validation ends", trainer, module)

    def on_validation_end(self, trainer, module):
        self._note("after validation", trainer, module)

    def on_train_end(self, trainer, module):
        self._note("after training", trainer, module)


def difference(one, other):
    """Return where two ledgers part first: the event, and the names of what differs there."""
    if [event for event, _ in one.pages] != [event for event, _ in other.pages]:
        return ["events"]
    for i, ((event, page), (_, beside)) in enumerate(zip(one.pages, other.pages, strict=True)):
        names = sorted(name for name in page.keys() | beside.keys() if page.get(name) != beside.get(name))
        if names:
            return [f"{i} {event}: {name}" for name in names]
    return []
