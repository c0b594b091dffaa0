"""Does the cost of SESS + Grad-CAM grow linearly in windows? Scales n = 1 ... 12."""

from statistics import median

import numpy as np
from measuring import ZERO, Bench, network, noise

from sess_lightning import SESS
from sess_lightning.methods import GradCAM


def main():
    bench = Bench(__file__, __doc__, size={"type": int, "default": 112})
    model, size = network("resnet18"), 64 if bench.quick else bench.args.size
    image = noise(size)
    methods = {n: SESS(GradCAM(), num_scales=n) for n in range(1, 13)}
    counts = [len(method.plan(model, (size, size))) for method in methods.values()]
    methods[1](model, image, ZERO)
    seconds = bench.time({n: lambda m=m: m(model, image, ZERO) for n, m in methods.items()})
    each = [median(seconds[n]) for n in methods]
    case = f"resnet18, {size} px"
    for n, count, s in zip(methods, counts, each, strict=True):
        bench.note(f"{case}, n {n:02d}, {count} windows", "ms a window", 1000 * s / count)
    slope, start = np.polyfit(counts, each, 1)
    bench.note(case, "ms a further window", 1000 * slope)
    bench.note(case, "ms beside the windows", 1000 * start)
    bench.note(case, "r^2 of the line", np.corrcoef(counts, each)[0, 1] ** 2, least=0.99)


if __name__ == "__main__":
    main()
