"""Fixtures for all rooms; `formula.py` holds weights and pictures that no random generator draws."""

import copy
import gc
import logging
import os
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shapes
from formula import build, picture

shapes.check_package()


def pytest_configure(config):
    # The models are small: on shared cores, threads would wait for each other longer than they work.
    torch.set_num_threads(int(os.environ.get("SESS_TEST_THREADS", "1")))


def pytest_collection_finish():
    gc.freeze()  # Imported modules stay: no collection of garbage need walk through them.


@pytest.fixture(autouse=True)
def _not_deterministic():
    """A Trainer(deterministic=True) leaves torch so, and each empty tensor would be filled in later tests."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _short_curves():
    """A callback's curves have 3 steps, not 28, half of a run; ``whole_curves`` where that matters."""
    from sess_lightning.callback import explaining

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explaining, "SESSMetric", partial(explaining.SESSMetric, steps=3))
        yield


@pytest.fixture
def whole_curves(monkeypatch):
    from sess_lightning.metrics import SESSMetric

    monkeypatch.setattr("sess_lightning.callback.explaining.SESSMetric", SESSMetric)


@pytest.fixture
def tiny():
    """224 px -> 7 x 7 x 24 -> 5 classes; the test's own copy."""
    return copy.deepcopy(build("tiny"))


@pytest.fixture
def images():
    """Two pictures for ``tiny``."""
    return torch.stack([picture(224, 224, 1), picture(224, 224, 2)])


@pytest.fixture
def targets():
    return torch.tensor([0, 1])


class SyncSpy(TorchDispatchMode):
    """Fails on every operator that makes a GPU's host wait for a value or a shape, or copies between both."""

    WAITS = frozenset({
        "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount", "equal",
    })  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        indices = args[1] if name in ("index.Tensor", "index_put", "index_put_") else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        waits = name.partition(".")[0] in self.WAITS or name == "repeat_interleave.Tensor"
        devices = {item.device.type for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)}
        devices |= (
            {torch.device(kwargs["device"]).type} if name == "_to_copy" and kwargs.get("device") else set()
        )
        if waits or masked or len(devices) > 1:
            pytest.fail(f"{name} makes the host wait")
        return func(*args, **kwargs)


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as MPS: fails on every operator that gives any."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if any(isinstance(item, torch.Tensor) and item.dtype == torch.float64 for item in tree_leaves(found)):
            pytest.fail(f"{func.name()} gives float64")
        return found


@pytest.fixture
def without_float64():
    return NoFloat64()


@pytest.fixture
def sync_spy():
    return SyncSpy()


@pytest.fixture
def unchecked():
    """Without the run-time checks of shapes: what users meet."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def told(caplog, monkeypatch):
    """What Lightning's Trainer is told in lines of text."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning_utilities",
        "lightning.pytorch.utilities.rank_zero",
    ):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "SESSCallback" in record.getMessage()]
