"""The callback's validation run, measured, against what `sess-lightning cost` estimates from its parts."""

import logging
import tempfile
import time
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from measuring import Bench, network
from torch.utils.data import DataLoader, TensorDataset

from sess_lightning import SESS, SESSCallback
from sess_lightning.cost.measure import measure_cost
from sess_lightning.cost.measuring import forwards_of
from sess_lightning.methods import GradCAM


class Whole(LightningModule):
    """Does nothing in validation: what is left is the callback."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)

    def validation_step(self, batch, batch_idx):
        pass


def main():
    bench = Bench(__file__, __doc__)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    samples, size = (2, 64) if bench.quick else (8, 128)
    method, model = SESS(GradCAM(), num_scales=3), Whole(network("resnet18", num_classes=10))
    data = DataLoader(TensorDataset(torch.rand(samples, 3, size, size), torch.arange(samples)), batch_size=4)

    def validate():
        with tempfile.TemporaryDirectory() as folder:
            callback = SESSCallback(method, num_samples=samples, num_images=4, on_error="raise")
            Trainer(
                callbacks=[callback], logger=CSVLogger(folder), accelerator="cpu", enable_progress_bar=False
            ).validate(model, data, verbose=False)

    validate()
    counted = forwards_of(model, validate).count
    costs = measure_cost(model, next(iter(data))[0][:1], method, num_samples=samples, rounds=bench.rounds)
    assert counted <= costs.run.run_forwards
    start = time.perf_counter()
    validate()
    seconds = time.perf_counter() - start
    case = f"resnet18, {size} px, {samples} samples"
    bench.note(case, "forwards counted / at most", counted / costs.run.run_forwards)
    bench.note(case, "seconds estimated (wall)", costs.run.run_seconds)
    bench.note(case, "seconds measured (wall)", seconds)


if __name__ == "__main__":
    main()
