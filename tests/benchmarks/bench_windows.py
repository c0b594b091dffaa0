"""SESS + Grad-CAM against the bare forward of the same windows, plain and with batch norms folded away."""

import torch
from measuring import ZERO, Bench, network, noise

from sess_lightning import SESS
from sess_lightning.cost.measuring import bare_copy, bare_forward, forwards_of
from sess_lightning.introspection.folding import folded
from sess_lightning.methods import GradCAM

NETWORKS = {"resnet18": 1.15, "resnet50": 1.10, "vgg16": 1.10}


def main():
    bench = Bench(
        __file__,
        __doc__,
        networks={"nargs": "+", "default": list(NETWORKS)},
        scales={"nargs": "+", "type": int, "default": [6, 12]},
    )
    image = noise()
    for name in ["resnet18"] if bench.quick else bench.args.networks:
        model = network(name)
        without = folded(model) if any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) else None
        for n in [3] if bench.quick else bench.args.scales:
            compare(bench, name, n, model, without, image)


def compare(bench, name, n, model, without, image):
    method = SESS(GradCAM(), num_scales=n)
    method.base(model, image, ZERO)  # Finds the layer, once for all.
    seen = forwards_of(model, lambda: method(model, image, ZERO))
    assert seen.count == len(method.plan(model, (224, 224)))
    runs = {
        "bare": bare_forward(bare_copy(model), seen.batches),
        "SESS": lambda: method(model, image, ZERO),
    }
    if without is not None:
        method.base(without, image, ZERO)
        runs["folded"] = lambda: method(without, image, ZERO)
    seconds = bench.time(runs)
    case = f"{name}, n {n}, {seen.count} windows"
    bench.ratio(case, "SESS / bare", seconds["SESS"], seconds["bare"], most=NETWORKS[name])
    if without is not None:
        bench.ratio(case, "SESS, folded / bare", seconds["folded"], seconds["bare"], most=1.0)
        apart = (method(without, image, ZERO) - method(model, image, ZERO)).abs()
        bench.note(case, "folded, largest difference of the map", float(apart.max()))
        bench.note(case, "folded, pixels of 50,176 apart by 1e-4", float((apart > 1e-4).sum()))


if __name__ == "__main__":
    main()
