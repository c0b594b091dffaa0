"""The code that only tensors on an accelerator take, run on the CPU: what it computes, not how fast."""

from contextlib import contextmanager
from unittest import mock

import torch

from sess_lightning.engine import fusion


@contextmanager
def as_on_a_device():
    with (
        mock.patch.object(torch.Tensor, "is_cpu", property(lambda _: False), create=True),
        mock.patch.object(fusion, "CPU_BYTES", fusion.DEVICE_BYTES),
    ):
        yield
