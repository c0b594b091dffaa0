"""One image, one map: how far maps differ between ways to compute them.

    python examples/same_map.py --data DIR [--network mobilenet_v2] [--images 20] [--out FILE.md]

Explains the same photographs by SESS over Grad-CAM, guided backprop and Group-CAM in several ways, each in a
process of its own: other batch sizes, image by image, the other memory layout and more threads, the weakest
CPU's instructions, folded batch norms, and a GPU in float32 where there is one. It prints the
largest difference of any pixel from the first way, and how many pixels differ by more than 1e-4. DIR is as
for ``sharper.py``. Group-CAM asks the model 34 times per window and is therefore pre-filtered.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from sess_lightning.evaluation import Experiment
from sess_lightning.evaluation.datasets import PictureFolder, read_picture
from sess_lightning.introspection.folding import folded
from sess_lightning.methods import SESS, GradCAM, GroupCAM, GuidedBackprop
from sharper import NETWORKS

WAYS: dict[str, dict[str, str]] = {
    "batches of 8, channels last, 1 thread": {},
    "batches of 3": {},
    "image by image": {},
    "channels first, 4 threads": {"OMP_NUM_THREADS": "4"},
    "instructions of a CPU with SSE4.1": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "folded batch norms": {},
    "a GPU, float32": {},
}
METHODS = {
    f"{name}, n {scales}": (base, scales, ratio)
    for name, base, ratio in (
        ("Grad-CAM", GradCAM(), 0.0),
        ("Guided backprop, r .5", GuidedBackprop(), 0.5),
        ("Group-CAM, r .9", GroupCAM(), 0.9),
    )
    for scales in (6, 12)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v2")
    parser.add_argument("--images", type=int, default=20, help="the first so many")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, help="a Markdown file to write")
    parser.add_argument("--parallel", action="store_true", help="all ways at once")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        torch.save(compute(args), args.save)
        return
    maps = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = [way for way in WAYS if "GPU" not in way or torch.cuda.is_available()]
        files = {way: Path(folder) / f"{place}.pt" for place, way in enumerate(ways)}
        started = []
        for way, file in files.items():
            command = [sys.executable, *sys.argv, "--way", way, "--save", str(file)]
            started.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **WAYS[way]}))
            if not args.parallel:
                started[-1].wait()
        for way, process in zip(ways, started, strict=True):
            if process.wait():
                raise SystemExit(f"{way}: failed")
            maps[way] = torch.load(files[way])
    text = table(args, maps)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


def compute(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return each method's maps, (images, height, width), computed in one way."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    build, (mean, std), size = NETWORKS[args.network]
    model: nn.Module = build().eval()
    if "folded" in args.way:
        model = folded(model)
    first = "channels first" in args.way
    model = model.to(memory_format=torch.contiguous_format if first else torch.channels_last)
    device = torch.device("cuda" if "GPU" in args.way else "cpu")
    framing = Experiment(GradCAM(), size=size, framing="square", antialias=True, mean=mean, std=std)
    data = PictureFolder(args.data)
    samples = [data[i] for i in range(args.images)]
    images = torch.cat([framing.images(read_picture(sample)) for sample in samples]).to(device)
    images = images.contiguous(memory_format=torch.contiguous_format if first else torch.channels_last)
    targets = torch.tensor([sample.trials[0].target for sample in samples], device=device)
    model = model.to(device)
    together = 1 if args.way == "image by image" else 5
    found = {}
    for name in args.methods:
        base, scales, ratio = METHODS[name]
        method = SESS(base, scales, ratio, batch_size=3 if args.way == "batches of 3" else 8)
        parts = zip(images.split(together), targets.split(together), strict=True)
        found[name] = torch.cat([method(model, *part).cpu() for part in parts])
    return found


def table(args: argparse.Namespace, maps: dict[str, dict[str, Tensor]]) -> str:
    """Return the largest differences as Markdown."""
    reference, *others = maps
    lines = [
        f"{args.network}, {args.images} photographs, torch {torch.__version__}; against {reference}: largest",
        "difference of a pixel, and pixels that differ by more than 1e-4.",
        "",
        "| | " + " | ".join(others) + " |",
        "|---" * (len(others) + 1) + "|",
    ]
    for name in args.methods:
        cells = []
        for way in others:
            off = (maps[way][name] - maps[reference][name]).abs()
            cells.append(f"{off.max():.1e}, {int((off > 1e-4).sum())} of {off.numel():,}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
