"""Do maps depend on what the model has learned? The sanity check of randomised weights.

    python examples/sanity.py --data DIR [--network mobilenet_v2] [--images 60] [--device cuda] [--out FILE]

Explains the label of photographs by the trained network, by the same network with its head drawn anew, and
with all its weights drawn anew, and prints Spearman's rank correlation of the maps (on 28 x 28 cells, mean
over images, with a 95 % bootstrap interval). Maps that stay alike would be an edge detector's: the lower, the
better. DIR is as for ``sharper.py``.

Source: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from sess_lightning.evaluation import Experiment
from sess_lightning.evaluation.datasets import PictureFolder
from sess_lightning.evaluation.datasets.samples import read_picture
from sess_lightning.methods import SESS, ContrastiveSESS, GradCAM, GuidedBackprop
from sess_lightning.metrics.bootstrap import interval
from sess_lightning.metrics.functional import rank_correlation
from sharper import NETWORKS

METHODS = {
    "Grad-CAM": GradCAM(),
    "SESS, n 6": SESS(GradCAM()),
    "ContrastiveSESS, n 6": ContrastiveSESS(),
    "Guided backprop": GuidedBackprop(),
}
CELLS = 28


def redrawn(model: nn.Module, only_head: bool) -> nn.Module:
    """Return a copy with the weights of its last linear layer, or of all layers, drawn anew (seed 0)."""
    other = copy.deepcopy(model)
    layers = [layer for layer in other.modules() if hasattr(layer, "reset_parameters")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in [one for one in layers if isinstance(one, nn.Linear)][-1:] if only_head else layers:
            layer.reset_parameters()
    return other.eval()


def cells(saliency: Tensor) -> Tensor:
    """Return the means of maps over 28 x 28 cells, a row per map."""
    return adaptive_avg_pool2d(saliency[:, None], CELLS).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v2")
    parser.add_argument("--images", type=int, default=60, help="the first so many")
    parser.add_argument("--device", default="cpu", help='such as "cuda"')
    parser.add_argument("--out", type=Path, help="a Markdown file to append to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    build, (mean, std), size = NETWORKS[args.network]
    framing = Experiment(GradCAM(), size=size, framing="square", antialias=True, mean=mean, std=std)
    trained = build().to(args.device).eval()
    others = {"head": redrawn(trained, True), "all": redrawn(trained, False)}
    found: dict[tuple[str, str], list[Tensor]] = {}
    data = PictureFolder(args.data)
    for i in tqdm(range(min(args.images, len(data)))):
        sample = data[i]
        image = framing.images(read_picture(sample)).to(args.device)
        target = torch.tensor([sample.trials[0].target], device=args.device)
        for name, method in METHODS.items():
            own = cells(method(trained, image, target))
            for kind, other in others.items():
                alike = rank_correlation(own, cells(method(other, image, target)))
                found.setdefault((name, kind), []).append(alike.cpu())
    text = table(args.network, found)
    print(text)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n\n")


def table(network: str, found: dict[tuple[str, str], list[Tensor]]) -> str:
    """Return the correlations as Markdown; a flat map has none and is counted."""
    lines = [f"{network}, {len(next(iter(found.values())))} photographs", ""]
    lines += ["| method | head drawn anew | all weights drawn anew | flat maps |", "|---|---|---|---|"]
    for name in METHODS:
        texts, flat = [], []
        for kind in ("head", "all"):
            values = torch.cat(found[name, kind])
            flat.append(int(values.isnan().sum()))
            values = values[~values.isnan()]
            drawn = torch.randint(
                len(values) or 1, (2000, len(values)), generator=torch.Generator().manual_seed(0)
            )
            low, high = interval(values[drawn].mean(1)) or (0.0, 0.0)
            texts.append(f"{values.mean():.2f} [{low:.2f}, {high:.2f}]" if len(values) else "all flat")
        lines.append(f"| {name} | {texts[0]} | {texts[1]} | {flat[0]}, {flat[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
