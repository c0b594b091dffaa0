"""SESS + Grad-CAM against the same algorithm written window by window around the package grad-cam."""

import cv2
import numpy as np
import torch
from measuring import ZERO, Bench, network, noise
from pytorch_grad_cam import GradCAM as Package
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from sess_lightning import SESS
from sess_lightning.cost.measuring import forwards_of
from sess_lightning.methods import GradCAM
from sess_lightning.ops import resize

LAYERS = {"resnet18": "layer4", "resnet50": "layer4", "vgg16": "features.29"}


def window_by_window(model, layer, image, target, plan, ratio):
    """In the paper's order: score every window, drop the lowest, explain the others, fuse."""
    crops, places = [], []
    for scale, boxes in zip(plan.scales, plan.boxes, strict=True):
        scaled = resize(image, scale)
        for x0, y0, x1, y1 in boxes:
            crops.append(scaled[:, :, y0:y1, x0:x1])
            places.append((scale, (x0, y0, x1, y1)))
    with torch.no_grad():
        scores = [model(crop).softmax(1)[0, target].item() for crop in crops]
    kept = np.argsort(scores)[::-1][: len(crops) - int(len(crops) * ratio)]
    total, count = np.zeros(plan.size, np.float32), np.zeros(plan.size, np.float32)
    with Package(model, [layer]) as cam:
        for i in kept:
            found = cam(crops[i], [ClassifierOutputTarget(target)])[0]
            scale, (x0, y0, x1, y1) = places[i]
            canvas = np.zeros(scale, np.float32)
            canvas[y0:y1, x0:x1] = found * scores[i] / max(scores)
            drawn = cv2.resize(canvas, plan.size[::-1])
            total += drawn
            count += drawn > 0
    fused = total / np.maximum(count, 1)
    return (fused - fused.min()) / max(np.ptp(fused), 1e-12)


def main():
    bench = Bench(__file__, __doc__, networks={"nargs": "+", "default": ["resnet18", "resnet50"]})
    image, n = noise(), 3 if bench.quick else 6
    for name in ["resnet18"] if bench.quick else bench.args.networks:
        model = network(name)
        layer = model.get_submodule(LAYERS[name])
        for ratio, least in ((0.0, 3.5), (0.5, 2.0)):
            method = SESS(GradCAM(LAYERS[name]), num_scales=n, prefilter_ratio=ratio)
            plan = method.plan(model, (224, 224))
            theirs = window_by_window(model, layer, image, 0, plan, ratio)
            seen = forwards_of(model, lambda method=method, model=model: method(model, image, ZERO))
            assert seen.count == len(plan)
            ours = method(model, image, ZERO)[0].numpy()
            seconds = bench.time({
                "package": lambda r=ratio, m=model, at=layer, p=plan: window_by_window(m, at, image, 0, p, r),
                "SESS": lambda method=method, model=model: method(model, image, ZERO),
            })  # fmt: skip
            case = f"{name}, n {n}, r {ratio}"
            bench.ratio(case, "times as fast", seconds["package"], seconds["SESS"], least=least)
            bench.note(case, "correlation of both maps", np.corrcoef(ours.ravel(), theirs.ravel())[0, 1])


if __name__ == "__main__":
    main()
