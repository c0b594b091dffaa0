"""Insertion and deletion of an image's map against the bare forward of the same 56 images."""

from measuring import ZERO, Bench, network, noise

from sess_lightning import SESSMetric
from sess_lightning.cost.measuring import bare_copy, bare_forward, forwards_of
from sess_lightning.methods import CentreGaussian


def main():
    bench = Bench(__file__, __doc__, networks={"nargs": "+", "default": ["resnet18", "resnet50", "vgg16"]})
    image = noise()
    for name in ["resnet18"] if bench.quick else bench.args.networks:
        model = network(name)
        metric = SESSMetric(CentreGaussian())  # A map that costs no forward.
        metric.update(model, image, ZERO)  # The first picture of a run pays for the picture of zeros.
        seen = forwards_of(model, lambda metric=metric, model=model: metric.update(model, image, ZERO))
        assert seen.count == 56
        seconds = bench.time({
            "bare": bare_forward(bare_copy(model), seen.batches),
            "curves": lambda metric=metric, model=model: metric.update(model, image, ZERO),
        })  # fmt: skip
        bench.ratio(f"{name}, 56 images", "curves / bare", seconds["curves"], seconds["bare"], most=1.10)


if __name__ == "__main__":
    main()
