"""Where does a timm model look in my picture?

    python examples/recipes/timm_picture.py cat.jpg resnet50.a1_in1k

Writes `explained.png`: the picture, Grad-CAM and SESS for the class that the model predicts. The command
line does the same: `sess-lightning explain cat.jpg --model.name timm/resnet50.a1_in1k`.
"""

import sys

import matplotlib.pyplot as plt
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from sess_lightning import SESS, GradCAM


def main(path, name="resnet50.a1_in1k", pretrained=True):
    model = timm.create_model(name, pretrained=pretrained).eval()
    expected = resolve_model_data_config(model)
    transform = create_transform(**expected, is_training=False)
    images = transform(Image.open(path).convert("RGB"))[None]

    with torch.no_grad():
        probability, target = model(images).softmax(1).max(1)
    maps = {str(method): method(model, images, target)[0] for method in (GradCAM(), SESS(GradCAM()))}

    mean, std = (torch.tensor(expected[key]).view(3, 1, 1) for key in ("mean", "std"))
    picture = (images[0] * std + mean).clamp(0, 1).permute(1, 2, 0)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    for axis, (title, saliency) in zip(axes, {"picture": None, **maps}.items(), strict=True):
        axis.imshow(picture)
        axis.set_title(title)
        axis.axis("off")
        if saliency is not None:
            axis.imshow(saliency, cmap="jet", alpha=0.5)
    figure.suptitle(f"class {target.item()}, probability {probability.item():.3f}")
    figure.savefig("explained.png")
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
