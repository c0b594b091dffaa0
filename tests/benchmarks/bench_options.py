"""Fewer windows scored at r = 0.9 and 0.99: SESS + Grad-CAM against the bare forward of all its windows.

What the options cost in quality is measured by examples/coarse_to_fine.py, on real pictures and weights.
"""

from measuring import ZERO, Bench, network, noise

from sess_lightning import SESS
from sess_lightning.cost.measuring import bare_copy, bare_forward, forwards_of
from sess_lightning.methods import GradCAM

OPTIONS = {
    "none": {},
    "coarse to fine, 0.3": {"coarse_to_fine": 0.3},
}


def main():
    bench = Bench(
        __file__,
        __doc__,
        networks={"nargs": "+", "default": ["resnet18", "resnet50"]},
        scales={"type": int, "default": 12},
    )
    image, n = noise(), 3 if bench.quick else bench.args.scales
    for name in ["resnet18"] if bench.quick else bench.args.networks:
        model = network(name)
        whole = SESS(GradCAM(), num_scales=n)
        seen = forwards_of(model, lambda model=model, whole=whole: whole(model, image, ZERO))
        bare = bare_forward(bare_copy(model), seen.batches)
        for ratio in (0.9, 0.99):
            methods = {
                told: SESS(GradCAM(), num_scales=n, prefilter_ratio=ratio, **options)
                for told, options in OPTIONS.items()
            }
            for method in methods.values():
                method(model, image, ZERO)
            runs = {told: lambda m=m, model=model: m(model, image, ZERO) for told, m in methods.items()}
            seconds = bench.time({"bare": bare, **runs})
            case = f"{name}, n {n}, r {ratio}"
            for told in methods:
                most = None if told == "none" else 0.6
                bench.ratio(case, f"{told}: SESS / bare", seconds[told], seconds["bare"], most=most)


if __name__ == "__main__":
    main()
