"""Most bytes of tensors alive at a time in SESS + Grad-CAM, against the bare forward of one batch as large.

Counted, not timed: n = 12, 375 x 500 px, 157 windows of 224 px. The bare forward counts its batch, too.
"""

import torch
from measuring import ZERO, Bench, network, noise

from sess_lightning import SESS
from sess_lightning.cost.measuring import bare_copy, peak_bytes
from sess_lightning.methods import GradCAM


def bare_peak(model, batch_size):
    def run():
        with torch.inference_mode():
            return model(torch.zeros(batch_size, 3, 224, 224).to(memory_format=torch.channels_last))

    return peak_bytes(run)


def main():
    bench = Bench(__file__, __doc__, networks={"nargs": "+", "default": ["resnet18", "resnet50", "vgg16"]})
    image, n = noise(375, 500), 3 if bench.quick else 12
    for name in ["resnet18"] if bench.quick else bench.args.networks:
        model = network(name)
        method = SESS(GradCAM(), num_scales=n, window=224, batch_size=32)
        method.base(model, image, ZERO)
        peak = peak_bytes(lambda method=method, model=model: method(model, image, ZERO))
        count = len(method.plan(model, (375, 500)))
        batch = min(count, method.batch_size)
        bare = bare_peak(bare_copy(model), batch)
        case = f"{name}, 375 x 500, n {n}, {count} windows"
        bench.note(case, f"MiB, batches of {batch}", peak / 2**20)
        bench.note(case, "SESS / bare", peak / bare, most=1.5)


if __name__ == "__main__":
    main()
