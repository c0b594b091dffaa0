"""SESS with the recommended settings against the paper's: three networks, photographs with true boxes.

    python examples/sharper.py --data DIR [--network mobilenet_v2] [--images 120] [--device cuda] [--out DIR]

DIR holds photographs of ImageNet classes and ``annotations.json`` in COCO's format; an image that carries
``hard`` says whether it is difficult. It scores Grad-CAM, its map blurred, SESS with 6 and with 10 scales
and ``ContrastiveSESS`` with 6: Pointing Game (15 px), insertion, deletion, overall, relevance mass, and
paired differences to each with 95 % bootstrap intervals over images. The run appends to --out and continues
where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from finetune_imagenet import HALF, IMAGENET, efficientnet_lite, mobilenet_v2
from sess_lightning.evaluation import Experiment, evaluate
from sess_lightning.evaluation.datasets import PictureFolder
from sess_lightning.methods import SESS, Blurred, ContrastiveSESS, GradCAM

NETWORKS = {
    "mobilenet_v2": (mobilenet_v2, IMAGENET, 224),
    "efficientnet_lite0": (lambda: efficientnet_lite(0), HALF, 224),
    "efficientnet_lite1": (lambda: efficientnet_lite(1), HALF, 240),
}
RIVALS = {
    "Grad-CAM": GradCAM(),
    "Grad-CAM, blurred": Blurred(GradCAM()),
    "SESS, n 6": SESS(GradCAM()),
    "SESS, n 10": SESS(GradCAM(), num_scales=10),
}
COLUMNS = ("pointing_game", "pointing_game_difficult", "insertion", "deletion", "overall", "relevance_mass")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v2")
    parser.add_argument("--images", type=int, default=120, help="how many to draw at random, seed 0")
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--device", default="cpu", help='such as "cuda"')
    parser.add_argument("--out", type=Path, default=Path("runs/sharper"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    build, (mean, std), size = NETWORKS[args.network]
    experiment = Experiment(
        ContrastiveSESS(),
        compare={name: RIVALS[name] for name in args.rivals},
        size=size,
        framing="square",
        antialias=True,
        mean=mean,
        std=std,
        samples=args.images,
        batch_size=8,
    )
    model = build().eval().to(args.device, memory_format=torch.channels_last)
    results = evaluate(model, PictureFolder(args.data), experiment, args.out / args.network, progress=True)
    print(table(args.network, results.figures, args.rivals))


def table(network: str, scores: dict[str, float], rivals: list[str]) -> str:
    """Return a Markdown table: a row per method, then the paired differences to each, losses in bold."""
    lines = [
        f"{network}, {scores['n']:.0f} photographs",
        "",
        "| method | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, prefix in [("ContrastiveSESS, n 6", ""), *((rival, f"{rival}/") for rival in rivals)]:
        cells = [f"{100 * scores[prefix + key]:.1f}" if prefix + key in scores else "" for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for rival in rivals:
        cells = [difference(scores, f"minus_{rival}/{key}", key == "deletion") for key in COLUMNS]
        lines.append(f"| less {rival} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(scores: dict[str, float], key: str, lower_is_better: bool) -> str:
    """Return a paired difference with its interval, in percent; bold if it is a loss beyond that."""
    if key not in scores:
        return ""
    low, high = scores.get(f"{key}_ci_low"), scores.get(f"{key}_ci_high")
    text = f"{100 * scores[key]:+.1f}"
    if low is None or high is None:
        return text
    text += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if (low > 0 if lower_is_better else high < 0) else text


if __name__ == "__main__":
    main()
