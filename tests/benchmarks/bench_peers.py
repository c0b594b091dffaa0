"""Grad-CAM against grad-cam, captum and torchcam: one map at the image's size, model and layer the same."""

import torch
from captum.attr import LayerGradCam
from measuring import Bench, network, noise
from pytorch_grad_cam import GradCAM as Package
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.nn.functional import interpolate
from torchcam.methods import GradCAM as TorchCAM

from sess_lightning.methods import GradCAM

LAYERS = {"tiny": "4", "resnet18": "layer4", "mobilenet_v2": "features"}


def tiny():
    layers = [nn.Conv2d(3, 8, 7, 4, 3), nn.ReLU(), nn.Conv2d(8, 24, 3, 8, 1), nn.ReLU(), nn.Identity()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)).eval()


def upsampled(maps):
    return interpolate(maps, (224, 224), mode="bilinear")


def ways(model, layer, images):
    """Return what each package does for a batch, its hooks included: they do not stay on a training model."""
    targets, at = torch.zeros(len(images), dtype=torch.long), model.get_submodule(layer)
    method = GradCAM(layer)

    def grad_cam():
        with Package(model, [at]) as cam:
            return cam(images, [ClassifierOutputTarget(0)] * len(images))

    def captum():
        return upsampled(LayerGradCam(model, at).attribute(images, targets, relu_attributions=True))

    def torchcam():
        with TorchCAM(model, at) as cam:
            return upsampled(cam([0] * len(images), model(images))[0][:, None])

    ours = {"ours": lambda: method(model, images, targets)}
    return ours | {"grad-cam": grad_cam, "captum": captum, "torchcam": torchcam}


def main():
    bench = Bench(__file__, __doc__, networks={"nargs": "+", "default": list(LAYERS)})
    for name in ["tiny"] if bench.quick else bench.args.networks:
        model = tiny() if name == "tiny" else network(name)
        for count in (1, 8):
            runs = ways(model, LAYERS[name], noise(count=count))
            times = 50 if name == "tiny" else 3  # A tiny network's map takes less than the clock tells.
            seconds = bench.time({
                way: lambda run=run, times=times: [run() for _ in range(times)] for way, run in runs.items()
            })  # fmt: skip
            for peer in [*runs][1:]:
                case = f"{name}, {count} image{'s' if count > 1 else ''}"
                bench.ratio(case, f"Grad-CAM / {peer}", seconds["ours"], seconds[peer], most=1.0)


if __name__ == "__main__":
    main()
