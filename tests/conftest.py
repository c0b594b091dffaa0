"""Fixtures for all rooms; `formula.py` holds weights and pictures that no random generator draws."""

import copy

import pytest
import torch
from formula import build, picture
from torch.utils._python_dispatch import TorchDispatchMode


def pytest_configure(config):
    # Not in pyproject.toml: there it would import the package before jaxtyping's checks are in place.
    config.addinivalue_line("filterwarnings", "error::sess_lightning.types.SESSWarning")


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
    """Fails on every operator that would make a GPU's host wait, or read a device's value."""

    WAITS = (
        "_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal",
        "is_nonzero", "repeat_interleave.Tensor", "allclose",
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        assert not any(name == wait or name.split(".")[0] == wait for wait in self.WAITS), f"{name} waits"
        index = args[1] if name.startswith("index") and len(args) > 1 else ()
        masks = (
            [i for i in index if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            if name
            in (
                "index.Tensor",
                "index_put_",
            )
            else []
        )
        assert not masks, f"{name} with a mask waits"
        return func(*args, **(kwargs or {}))


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
