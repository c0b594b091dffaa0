import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sess_lightning.callback.gallery import Exhibit
from sess_lightning.types import Batch


class Copies(TorchDispatchMode):
    """Notes which copies to the host wait for the device; what they give is empty."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() == "aten::_to_copy" and torch.device(kwargs.get("device", "meta")).type == "cpu":
            self.waits.append(not kwargs.get("non_blocking"))
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


def test_what_is_sent_to_the_host_is_not_waited_for():
    sample = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    there = {name: torch.zeros(8, 8, device="meta") for name in ("base", "SESS")}
    with Copies() as copies:
        here = Exhibit(sample, there, torch.zeros(9, device="meta")).sent()
    assert copies.waits == [False] * 3
    assert {each.device.type for each in (*here.maps.values(), here.figures)} == {"cpu"}
