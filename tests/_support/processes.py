"""Validates and trains in one, two and three processes over gloo; what came of it is printed as JSON.

Run by ``test_processes.py``: a hang ends with its time limit.
"""

import hashlib
import json
import os
import socket
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset, Subset
from torchmetrics import MeanMetric

from faults import FAULTS, STAGES, Red, failing, fussy, on_last
from lightning_models import Classifier, Knowing, Squares, boxed, fit, validate
from sess_lightning import SESS, SESSCallback
from sess_lightning.callback import explaining, pace
from sess_lightning.introspection.lending import explaining as lent
from sess_lightning.introspection.shards import groups_of
from sess_lightning.methods import GradCAM
from sess_lightning.metrics import SESSMetric
from sess_lightning.types import Explanation, SaliencyMethod, SESSWarning

STEPS = 3
"""Of a curve: 28, as it comes, take most of the time."""

SAMPLED = {
    "some": {"num_samples": 6},
    "batches of three": {"num_samples": 6, "batch_size": 3},
    "all, some padded": {"num_samples": 32},
    "fewer than processes": {"num_samples": 1},
    "as many as the budget pays for": {"max_forwards": 1000},
    "the same loader everywhere": {"num_samples": 6, "use_distributed_sampler": False},
}


SHARDED = {
    "evenly": ((8, 8), {}),
    "unevenly": ((12, 4), {}),
    "some of it": ((12, 4), {"num_samples": 6}),
    "shuffled": ((8, 8), {"shuffle": True}),
    "shuffled unevenly": ((11, 5), {"shuffle": True}),
    "some of it, shuffled": ((11, 5), {"shuffle": True, "num_samples": 6}),
}


def named(index, image, label, boxes):
    """Brings the place in the data set along."""
    return image, {"label": label, "boxes": boxes.float(), "id": index}


class Shards(IterableDataset):
    """16 squares, dealt out to the processes."""

    def __init__(self, *counts):
        self.counts, self.data = counts, Squares(16, boxed)

    def __iter__(self):
        rank = torch.distributed.get_rank() if len(self.counts) > 1 else 0
        first = sum(self.counts[:rank])
        return (self.data[i] for i in range(first, first + self.counts[rank]))


def callback(**kwargs):
    return SESSCallback(SESS(GradCAM(), num_scales=2), **kwargs)


def figures(its):
    return {name: value.item() for name, value in its.callback_metrics.items()}


def sampled(folder, options):
    """Validate on 14 squares."""
    options = dict(options)
    data = DataLoader(Squares(14, named), options.pop("batch_size", 4))
    settings = {key: options.pop(key) for key in ("num_samples", "max_forwards") if key in options}
    mine = callback(**settings)
    its = validate(folder, mine, val=data, **options)
    ids = [int(i) for i in mine.keeper.ids]
    return {"scalars": figures(its), "ids": ids}


def sharded(folder, *counts, shuffle=False, num_samples=16):
    """Validate on 16 squares that were dealt out to the processes by hand."""
    rank = torch.distributed.get_rank()
    own = range(sum(counts[:rank]), sum(counts[: rank + 1]))
    data = DataLoader(Subset(Squares(16, named), own), 4, shuffle=shuffle)
    mine = callback(num_samples=num_samples)
    its = validate(folder, mine, val=data, use_distributed_sampler=False)
    return {"n": figures(its)["sess/n"], "ids": [int(i) for i in mine.keeper.ids]}


def shuffled(folder, count, num_samples):
    """Validate on squares that Lightning shuffles and deals out."""
    mine = callback(num_samples=num_samples)
    its = validate(folder, mine, val=DataLoader(Squares(count, named), 4, shuffle=True))
    return {"n": figures(its)["sess/n"], "ids": [int(i) for i in mine.keeper.ids]}


def resumed(folder):
    """Fit on shuffled squares for an epoch, and resume with another batch size: ids, and maps' likeness."""
    found = []
    for epochs, batch_size in ((1, 4), (2, 3)):
        mine = callback(num_samples=6)
        kept = ModelCheckpoint(folder, save_last=True, enable_version_counter=False)
        torch.manual_seed(epochs)
        its = fit(
            folder, mine, kept, val=DataLoader(Squares(16, named), batch_size, shuffle=True),
            max_epochs=epochs, num_sanity_val_steps=0, ckpt_path=None if epochs == 1 else found[0]["path"],
        )  # fmt: skip
        found.append({"ids": [int(i) for i in mine.keeper.ids], "path": kept.last_model_path,
                      "scalars": figures(its)})  # fmt: skip
    return found


def streamed(folder, counts):
    its = validate(folder, callback(max_forwards=100_000), val=DataLoader(Shards(*counts), 4), logger=False)
    path = Path(folder) / "sess" / "curves.csv"
    return {"scalars": figures(its), "curves": path.read_text() if path.exists() else ""}


def fingerprint(its):
    state = its.lightning_module.state_dict().items()
    return {name: hashlib.sha1(value.numpy().tobytes()).hexdigest() for name, value in state}


class Rows(Callback):
    """Keeps what is logged after every epoch."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.rows.append(figures(trainer))


def faulty(folder, fault):
    rows = Rows()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SESSWarning)
        its = fault.run(
            lambda folder, mine, **options: fit(folder, mine, rows, **options),
            lambda **kwargs: SESSCallback(**{"method": Red(), "compare": {}, "num_samples": 4, **kwargs}),
            folder,
        )
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    return {"weights": fingerprint(its), "epochs": its.current_epoch, "rows": rows.rows, "told": told}


def broken_off(folder, stage, on_rank):
    """Fit while one stage of every run fails on one process; monitors must find their keys all the same."""
    monitors = (
        EarlyStopping("sess/overall", mode="max", patience=9),
        ModelCheckpoint(folder, monitor="sess/overall", mode="max", enable_version_counter=False),
    )
    with failing(STAGES[stage], on_rank):
        mine = SESSCallback(Red(), num_samples=4, compare={})
        its = fit(folder, mine, *monitors, max_epochs=2, logger=False)
    return {"weights": fingerprint(its), "epochs": its.current_epoch}


def warned(folder, *callbacks):
    """Return the warnings of all kinds that a training gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, *callbacks, max_epochs=2, module=Telling)
    return [str(each.message) for each in caught]


class Rising(Knowing):
    """Its accuracy rises from run to run."""

    def on_validation_epoch_end(self):
        self.log("val_acc", 0.6 + 0.2 * self.current_epoch, sync_dist=True)


class Telling(Rising):
    """Warns by itself: some versions of torch and Lightning do not."""

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        warnings.warn("told by the module", stacklevel=1)


class Reducing(Classifier):
    """Looks at the brightness of all processes' images."""

    def forward(self, images):
        mean = images.mean()
        torch.distributed.all_reduce(mean)
        return super().forward(images) + 0 * mean


class Gathering(Classifier):
    """Tells the others how many images it was given, in a part of its own and a group of its own."""

    def forward(self, images):
        group = torch.distributed.new_group()
        told = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, len(images), group=group)
        return super().forward(images)


class Metrical(Classifier):
    """Keeps a metric in its forward that is gathered in every step."""

    def __init__(self):
        super().__init__()
        self.brightness = MeanMetric(dist_sync_on_step=True)

    def forward(self, images):
        self.brightness(images.mean())
        return super().forward(images)


COMMUNICATING = {"all_reduce": Reducing, "all_gather_object": Gathering, "a metric": Metrical}


def communicating(folder, module, *callbacks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SESSWarning)
        its = fit(folder, *callbacks, module=module, max_epochs=2, num_sanity_val_steps=0)
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    return {"weights": fingerprint(its), "told": told}


@dataclass(frozen=True)
class Halfway(SaliencyMethod):
    """Fails on the last process in the middle of a backward pass."""

    def explain(self, model, images, targets):
        with lent(model):
            images = images.clone().requires_grad_()
            features = model.net[:3](images)
            if on_last():
                features.register_hook(self.fail)
            (gradient,) = torch.autograd.grad(model.net[3:](features).sum(), images)
        return Explanation(gradient.abs().sum(1).clamp(0, 1), torch.ones(len(images)))

    def fail(self, gradient):
        raise RuntimeError("half-way")


@dataclass(frozen=True)
class Leaving(SaliencyMethod):
    """The bright square in the first run, then all but that."""

    runs: list = field(default_factory=list, compare=False, repr=False)
    forwards: ClassVar[int] = 0

    def explain(self, model, images, targets):
        maps = images.amax(1).clamp(0, 1) > 0.9
        return Explanation((maps != bool(self.runs)).float(), torch.ones(len(images)))


class NextRun(Callback):
    def on_validation_end(self, trainer, pl_module):
        mine = next(each for each in trainer.callbacks if isinstance(each, SESSCallback))
        mine.settings.method.runs.append(1)


def alarmed(folder):
    rows = Rows()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SESSWarning)
        fit(
            folder, SESSCallback(Leaving(), num_samples=14, compare={}), NextRun(), rows, module=Rising,
            val=DataLoader(Squares(14, boxed), 4), max_epochs=3, num_sanity_val_steps=0,
        )  # fmt: skip
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    return {"told": told, "rows": rows.rows}


class Sharded(Classifier):
    """Is sharded over the processes layer by layer, where they are given a mesh."""

    def configure_model(self):
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[3], self.net[8], self.net):
                fully_shard(layer, mesh=mesh)


def held(module):
    """Return, layer by layer, whether a process holds all parameters, and how that goes on."""
    groups = [
        group
        for layer in module.modules() if hasattr(layer, "_get_fsdp_state")
        for group in groups_of(layer._get_fsdp_state())
    ]  # fmt: skip
    return [
        [group.is_unsharded, group.reshard_after_backward, group._reshard_after_forward] for group in groups
    ]


def meshed():
    return {"devices": 2, "strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}


SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""torch 2.6 has ``fully_shard``, but cannot gather what a CPU holds."""
SHARES = {"uneven": (14, 5), "padded": (13, 16), "fewer than processes": (16, 1)}
HARMS = {
    "nothing": {},
    "an adapter on one process": {"batch_adapter": fussy},
    "a method on one process": {"method": Red(RuntimeError), "compare": {}},
    "a backward pass on one process": {"method": Halfway(), "compare": {}},
}


def shares(folder, count, num_samples, **options):
    """Validate a model that is sharded where there are several processes."""
    its = validate(
        folder, callback(num_samples=num_samples), module=Sharded,
        val=DataLoader(Squares(count, named), 4), **options,
    )  # fmt: skip
    return figures(its)


def harmed(folder, *callbacks):
    """Fit a sharded model; return its weights, and what of it the process holds afterwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SESSWarning)
        its = fit(folder, *callbacks, module=Sharded, max_epochs=2, **meshed())
    module = its.lightning_module
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }
    weights = {name: hashlib.sha1(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
    told = [str(each.message) for each in caught if issubclass(each.category, SESSWarning)]
    return {"weights": weights, "held": held(module), "told": told, "scalars": figures(its)}


def cases(folder, world):
    """Yield names and results."""
    yield "alarm", alarmed(f"{folder}/alarm")
    for name, options in SAMPLED.items():
        yield f"sampled: {name}", sampled(f"{folder}/{name}", options)
    for name, counts in {1: {"whole": (16,)}, 2: {"uneven": (12, 4), "empty": (16, 0)}}.get(
        world, {}
    ).items():
        yield f"streamed: {name}", streamed(f"{folder}/{name}", counts)
    if world > 1:
        yield "shuffled: 9 of 18", shuffled(f"{folder}/shuffled", 18, 9)
        yield "resumed", resumed(f"{folder}/resumed")
        yield "shuffled: 14 of 14", shuffled(f"{folder}/all shuffled", 14, 16)
    if world < 3 and SHARDS_ON_CPU:
        for name, (count, num_samples) in SHARES.items():
            options = meshed() if world == 2 else {}
            where = f"{folder}/shares {name}"
            yield f"shares: {name}", shares(where, count, num_samples, **options)
    if world == 2 and SHARDS_ON_CPU:
        yield "shares without", harmed(f"{folder}/shares")
        for name, options in HARMS.items():
            mine = (
                callback(**{"num_samples": 5, **options})
                if "method" not in options
                else SESSCallback(num_samples=5, **options)
            )
            yield f"harms: {name}", harmed(f"{folder}/harms {name}", mine)
    if world == 2:
        for name, (counts, options) in SHARDED.items():
            yield f"sharded: {name}", sharded(f"{folder}/{name}", *counts, **options)
    if world < 3:
        yield "without", {"weights": fingerprint(fit(folder, module=Classifier, max_epochs=2))}
        for name, fault in FAULTS.items():
            yield f"fault: {name}", faulty(f"{folder}/{name}", fault)
    if world == 2:
        for name, module in COMMUNICATING.items():
            for callbacks in ([], [callback(num_samples=3)]):
                where = f"{folder}/{name} {len(callbacks)}"
                yield f"{name}, {len(callbacks)}", communicating(where, module, *callbacks)
        yield "warnings", {"with": warned(folder, callback()), "without": warned(folder)}
        for stage, on_rank in product(STAGES, (0, 1)):
            yield f"{stage}, {on_rank}", broken_off(f"{folder}/{stage} {on_rank}", stage, on_rank)


def process(rank, world, port, folder):
    warnings.simplefilter("ignore")
    explaining.SESSMetric = partial(SESSMetric, steps=STEPS)
    pace.now = lambda: 0.0  # However slow this machine is: nothing takes long.
    if world > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in address.items()})
        import lightning_models

        plain = lightning_models.trainer
        lightning_models.trainer = lambda *args, **kwargs: plain(
            *args, **{"devices": world, "strategy": "ddp", **kwargs}
        )
    found = dict(cases(f"{folder}/{world}", world))
    Path(f"{folder}/{world}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def main(folder, worlds=(1, 2, 3)):
    found = {}
    for world in worlds:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.start_processes(process, (world, port, folder), world, start_method="fork")
        found[world] = [
            json.loads(Path(f"{folder}/{world}-{rank}.json").read_text(encoding="utf-8"))
            for rank in range(world)
        ]
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], [*map(int, sys.argv[2:])] or (1, 2, 3))
