"""SESS over Guided-BP and Group-CAM against their floors, at r = 0.5.

Guided-BP: the forward of all windows, and forward and backward to the input of those kept. Group-CAM:
the bare forward of every image that it shows to the model.
"""

import torch
from measuring import ZERO, Bench, network, noise

from sess_lightning import SESS
from sess_lightning.cost.measuring import bare_copy, bare_forward, forwards_of
from sess_lightning.methods import GroupCAM, GuidedBackprop


def to_the_input(model, batches):
    def run():
        for batch in batches:
            images = batch.detach().requires_grad_()
            torch.autograd.grad(model(images)[:, 0].sum(), images)

    return run


def main():
    bench = Bench(__file__, __doc__, networks={"nargs": "+", "default": ["resnet18", "resnet50", "vgg16"]})
    image = noise()
    for name in ["resnet18"] if bench.quick else bench.args.networks:
        model, n = network(name), 2 if bench.quick else 6
        bare = bare_copy(model)
        for base, scales in ((GuidedBackprop(), n), (GroupCAM(), 2)):
            method = SESS(base, num_scales=scales, prefilter_ratio=0.5)
            base(model, image, ZERO)  # Finds the layer, once for all.
            seen = forwards_of(model, lambda method=method, model=model: method(model, image, ZERO))
            assert seen.count == method.count_forwards(model, (224, 224))
            batches = seen.batches
            if isinstance(base, GuidedBackprop):
                scored = 0
                while sum(map(len, batches[:scored])) < len(method.plan(model, (224, 224))):
                    scored += 1
                first, then = bare_forward(bare, batches[:scored]), to_the_input(bare, batches[scored:])
            else:
                first, then = bare_forward(bare, batches), lambda: None
            seconds = bench.time({
                "floor": lambda first=first, then=then: (first(), then()),
                "SESS": lambda method=method, model=model: method(model, image, ZERO),
            })  # fmt: skip
            floor = [
                s * (seen.scale if not isinstance(base, GuidedBackprop) else 1) for s in seconds["floor"]
            ]
            case = f"{name}, {type(base).__name__}, n {scales}, {seen.count} forwards"
            bench.ratio(case, "SESS / floor", seconds["SESS"], floor, most=1.25)


if __name__ == "__main__":
    main()
