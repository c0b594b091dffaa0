import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from holdings import HOLDINGS, reading
from sess_lightning.introspection.copies import LARGE
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.state import copying_all
from sess_lightning.methods import SESS, GradCAM, GuidedBackprop
from sess_lightning.types import SESSWarning
from small_nets import Net, made


class Holding(Net):
    """Holds something, and its forward changes that."""

    def forward(self, images):
        self.change(self.held)
        return super().forward(images)


def holding(held, change):
    model = made(Holding).eval()
    model.held, model.change = held, change
    return model


@pytest.mark.parametrize("kind", HOLDINGS)
def test_what_a_model_holds_is_given_back(kind, images):
    make, change = HOLDINGS[kind]
    model = holding(make(), change)
    held, before = model.held, reading(model.held)
    for _ in range(2):
        SESS(GradCAM(), num_scales=2)(model, images, torch.tensor([0, 1]))
        assert model.held is held
        assert reading(held) == before
    model(images)
    assert reading(held) != before


def test_a_graph_that_was_recorded_before_is_differentiated_after(images):
    # The copies are written back without a new version, which autograd would refuse.
    model = holding(torch.ones(()), lambda scale: scale.data.mul_(2))
    model.register_buffer("scale", model.held)
    loss = (model.scale * model.head.weight).square().sum()
    GradCAM()(model, images, torch.tensor([0, 1]))
    loss.backward()
    assert torch.equal(model.head.weight.grad, 2 * model.head.weight)


def test_views_and_tied_weights_are_put_back_once():
    model = nn.Module()
    model.register_buffer("bank", torch.arange(12.0))
    model.register_buffer("row", model.bank[3:6])
    model.register_buffer("wide", torch.ones(1).expand(5))
    model.weight = model.tied = nn.Parameter(torch.ones(2), requires_grad=False)
    with explaining(model):
        model.row.data.zero_()
        model.bank.data[0] = 7
        model.wide.data[:1].zero_()
        model.tied.data.zero_()
    assert model.bank.tolist() == list(range(12))
    assert model.row.tolist() == [3, 4, 5]
    assert model.wide.tolist() == [1] * 5
    assert model.weight.tolist() == [1, 1]
    assert model.weight is model.tied


ODD = {
    "meta": lambda: torch.empty(3, device="meta"),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "mkldnn": lambda: torch.eye(2).to_mkldnn(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8),
    "empty": lambda: torch.zeros(0),
    "nan": lambda: torch.full((3,), torch.nan),
    "float8": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


def test_what_was_compared_may_still_be_resized():
    # NumPy forbids that to every storage that it has seen.
    model = nn.Module()
    model.register_buffer("small", torch.zeros(2))
    model.register_buffer("large", torch.zeros(LARGE))
    with explaining(model):
        model.small.data.add_(1)
        model.large.data[-1] = 1
    assert not model.small.any()
    assert not model.large.any()
    assert model.small.resize_(5).shape == (5,)
    assert model.large.resize_(2 * LARGE).shape == (2 * LARGE,)


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested|quantize)")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_any_kind_may_hang_on_a_model(kind):
    model, odd = nn.Module(), ODD[kind]()
    model.register_buffer("odd", odd)
    with explaining(model):
        pass
    assert model.odd is odd


def test_a_lazy_module_may_have_its_first_forward_in_an_explanation(images):
    model = made(Net)
    model.head = nn.LazyLinear(5)
    GradCAM("features")(model, images, torch.tensor([0, 1]))
    assert type(model.head) is nn.Linear
    assert model(images).shape == (2, 5)


def test_parameters_are_copied_at_first_and_then_only_those_that_a_forward_writes_to(images):
    model = made(Net)
    model.still = nn.Parameter(torch.zeros(2), requires_grad=False)

    def explained(write):
        with explaining(model):
            write()
        return model.still.tolist()

    assert explained(lambda: model.still.data.add_(1)) == [0, 0]
    assert explained(lambda: model.still.data.add_(1)) == [0, 0]
    with torch.no_grad():
        first = model.head.weight.clone()
    with pytest.warns(SESSWarning, match="wrote to 1 parameters during an explanation"):
        explained(lambda: nn.init.ones_(model.head.weight))
    assert torch.equal(model.head.weight, torch.ones_like(first))
    assert explained(lambda: nn.init.zeros_(model.head.weight)) == [0, 0]
    assert torch.equal(model.head.weight, torch.ones_like(first))


def test_what_cannot_be_copied_or_is_not_the_models_is_left_as_it_is(tmp_path):
    class Owner:
        pass

    model, owner = nn.Module(), Owner()
    owner.model = model
    model.proxy = weakref.proxy(owner)
    model.numbers = iter([1, 2, 3])
    model.frozen = np.zeros(2)
    model.frozen.flags.writeable = False
    with (tmp_path / "log").open("w") as model.log:
        with explaining(model):
            next(model.numbers)
            model.log.write("written")
            owner.mark = 1
        assert next(model.numbers) == 2
    assert (tmp_path / "log").read_text() == "written"
    assert owner.mark == 1


def test_a_failing_put_back_does_not_keep_the_rest_from_it(images):
    class Stubborn(list):
        def __setitem__(self, place, value):
            raise KeyError("stubborn")

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.values, self.calls = Stubborn([1]), 0

        def forward(self, images):
            self.values.append(2)
            self.calls += 1
            return images.mean((2, 3))

    model = Counting()
    with pytest.raises(KeyError, match="stubborn"):
        GuidedBackprop()(model, images, torch.tensor([0, 1]))
    assert model.calls == 0


def late_writer(writes):
    """A model whose forward pass begins to write to a parameter once ``writes`` holds something."""

    class Late(Net):
        def forward(self, images):
            if writes:
                next(self.parameters()).data.mul_(1.5)
            return super().forward(images)

    return made(Late)


@pytest.mark.parametrize("copies_all", [False, True])
def test_parameters_that_a_later_forward_pass_writes_to_are_put_back_where_all_are_copied(copies_all):
    writes = []
    model, images = late_writer(writes), torch.rand(2, 3, 32, 32)
    before = [parameter.clone() for parameter in model.parameters()]
    with copying_all() if copies_all else nullcontext():
        for _ in range(2):
            with explaining(model):
                model(images)
            writes.append(1)
    kept = [torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
    assert all(kept[1:])
    assert kept[0] == copies_all


class Guarded(torch.Tensor):
    """Refuses to be laid flat with others, as a wrapper of a user's own may."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("flatten_dense_tensors", "is_contiguous"):
            raise RuntimeError(f"refused: {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_of_a_users_own_kind_are_copied_by_their_storage():
    model = nn.Module()
    for name in ("first", "second"):
        model.register_buffer(name, torch.ones(3).as_subclass(Guarded))
    with explaining(model), torch.no_grad():
        model.first.add_(1)
    assert torch.equal(model.first.as_subclass(torch.Tensor), torch.ones(3))
    assert type(model.first) is Guarded
