import functools

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from sess_lightning import SESS
from sess_lightning.introspection.observers import unobserved
from sess_lightning.methods import GradCAM
from small_nets import Net, made, maps_of, same

CALLS, TOTAL = [], 0


class Counter(Callback):
    """A user's own Callback, whose method is a hook."""

    def __init__(self):
        self.seen, self.mean = 0, torch.zeros(())

    def count(self, _module, inputs, _output):
        self.seen += len(inputs[0])
        self.mean.mul_(0.9).add_(inputs[0].mean())

    def read(self):
        return self.seen, self.mean.item()

    def hook(self):
        return self.count

    def enclosed(self):
        return lambda *call: self.count(*call)


def closure():
    seen, last = 0, {}

    def count(_module, inputs, _output):
        nonlocal seen
        seen += len(inputs[0])
        last[seen] = inputs

    return count, lambda: (seen, len(last))


def by_globals(*_):
    global TOTAL
    TOTAL += 1
    CALLS.append(TOTAL)


def append(calls, *call):
    calls.append(call)


OBSERVERS = {
    "a closure": closure,
    "a method of a Callback": lambda: (lambda counter: (counter.hook(), counter.read))(Counter()),
    "a closure over a Callback": lambda: (lambda counter: (counter.enclosed(), counter.read))(Counter()),
    "globals": lambda: (by_globals, lambda: (list(CALLS), TOTAL)),
    "a partial": lambda: (lambda calls: (functools.partial(append, calls), lambda: len(calls)))([]),
}


@pytest.mark.parametrize("where", ["module", "every module"])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_what_a_hook_counts_is_not_fed(kind, where, images):
    model = made(Net)
    hook, read = OBSERVERS[kind]()
    place = model.features.register_forward_hook if where == "module" else register_module_forward_hook
    handle = place(hook)
    try:
        model(images)
        before = read()
        with torch.inference_mode(), unobserved(model):
            maps_of(model, images)
        assert read() == before
        model(images)
        assert read() != before
    finally:
        handle.remove()


def test_a_hook_that_is_a_part_of_the_model_runs(images):
    model = made(Net)
    prune.l1_unstructured(model.head, "weight", 0.5)
    kept = {}
    model.features[0].register_forward_hook(lambda *call: kept.update(features=call[2]))
    model.features[2].register_forward_hook(lambda *call: call[2] + kept["features"].mean())
    expected = maps_of(model, images)
    with unobserved(model):
        same(maps_of(model, images), expected)


def test_known_recorders_are_silent_and_back_in_their_order(images):
    model, order = made(Net), []

    def recorder(*_):
        order.append("recorder")

    recorder.__module__ = "wandb.integration.torch.wandb_torch"
    model.register_forward_hook(recorder)
    model.register_forward_hook(lambda *_: order.append("user"))
    model.register_forward_pre_hook(recorder)
    hooks, before = model._forward_hooks, list(model._forward_hooks.items())
    with unobserved(model):
        model(images)
        assert order == ["user"]
    assert model._forward_hooks is hooks
    assert list(hooks.items()) == before
    model(images)
    assert order == ["recorder", "recorder", "user"]


def test_a_flop_counter_does_not_count_windows():
    model, images = made(Net), torch.rand(2, 3, 32, 32)

    def counted(explains):
        with FlopCounterMode(display=False) as counter:
            model(images)
            if explains:
                with unobserved(model):
                    maps_of(model, images, SESS(GradCAM(), num_scales=2))
            model(images)
        return counter.get_flop_counts()

    assert counted(True) == counted(False)
    assert sum(counted(True)["Global"].values()) > 0
