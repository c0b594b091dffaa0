"""What SESS costs on a CUDA device, in ratios to the bare forward pass, into examples/results/gpu.md.

    python tests/benchmarks/gpu.py [--only ratios,run,...] [--out FILE] [--device cuda] [--quick]

Each figure is a median of rounds that alternate; times are between CUDA events around each run, the device
idle before it. ``--device cpu --quick`` shows that it runs.
"""

import argparse
import logging
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

from sess_lightning import SESS, GradCAM, SESSCallback, SESSMetric
from sess_lightning.cost.measuring import bare_forward, forwards_of
from sess_lightning.methods import RISE, XRAI, CentreGaussian, GroupCAM, GuidedBackprop, ScoreCAM

T4 = {
    "GradCAM": (0.03, "1.23/3.96", "0.84/2.36", "0.42/0.70"),
    "GuidedBackprop": (0.04, "1.29/4.09", "0.86/2.37", "0.41/0.73"),
    "GroupCAM": (0.13, "4.42/16.66", "2.54/8.54", "0.51/0.92"),
    "RISE": (38.25,),
    "ScoreCAM": (2.47,),
    "XRAI": (42.17,),
}
"""The paper's Table 2, seconds an image on an NVIDIA T4: alone, then with SESS at r 0, .5, .99, n 6/12."""
PARTS = {}


def part(run):
    PARTS[run.__name__] = run
    return run


class Bench:
    """Times runs on a device, and collects rows.

    Args:
        device: Where to run.
        quick: Whether to run once and on small images, to show that all parts run.
    """

    def __init__(self, device, quick):
        self.device, self.quick, self.rows = torch.device(device), quick, []
        self.side = 64 if quick else 224

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def once(self, run):
        """Return the milliseconds of one run on an idle device."""
        self.wait()
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        self.wait()
        return begin.elapsed_time(end)

    def times(self, runs, rounds=7):
        """Return the median milliseconds of each run, by name; rounds alternate."""
        for run in runs.values():
            run()
        found = {name: [] for name in runs}
        for turn in range(1 if self.quick else rounds):
            for name in runs if turn % 2 == 0 else reversed(runs):
                found[name].append(self.once(runs[name]))
        return {name: median(times) for name, times in found.items()}

    def model(self, name, **options):
        torch.manual_seed(0)
        return get_model("resnet18" if self.quick else name, **options).eval().to(self.device)

    def images(self, count, side=None):
        source = torch.Generator().manual_seed(1)
        return torch.rand(count, 3, side or self.side, side or self.side, generator=source).to(self.device)

    def targets(self, count):
        return torch.zeros(count, dtype=torch.long, device=self.device)

    def row(self, case, figure, value, target="", note=""):
        met = "" if target == "" else "met" if value <= target else "**missed**"
        self.rows.append((case, figure, f"{value:.4g}", f"<= {target}" if target != "" else "", met, note))
        print(" | ".join(self.rows[-1]), flush=True)

    def ratio(self, case, method, model, images, target="", context=None):
        """Time a method, or a metric's update, against the bare forward pass of the same batches."""
        targets = self.targets(len(images))
        update = getattr(method, "update", method)
        run = lambda: update(model, images, targets)  # noqa: E731
        if context is not None:
            run = context(run)
        run()
        seen = forwards_of(model, run)
        bare = bare_forward(model, seen.batches)
        found = self.times({"bare": bare if context is None else context(bare), "ours": run})
        found["bare"] *= seen.scale
        note = f"{found['ours']:.2f} ms, {seen.count} images"
        self.row(case, "ours / bare", found["ours"] / found["bare"], target, note)
        return found["ours"]


@part
def ratios(bench):
    """SESS + Grad-CAM, and the curves."""
    cases = [
        ("resnet50", 224, 8, 6, 1.05), ("resnet50", 224, 8, 12, 1.05), ("resnet50", 224, 1, 6, 1.15),
        ("resnet18", 128, 32, 6, 1.25), ("mobilenet_v2", 224, 8, 6, ""), ("vit_b_16", 224, 8, 6, ""),
    ]  # fmt: skip
    for name, side, count, scales, target in cases[:1] if bench.quick else cases:
        model, images = bench.model(name), bench.images(count, None if bench.quick else side)
        case = f"{name}, {side} px, {count} images, n {scales}"
        bench.ratio(case, SESS(GradCAM(), num_scales=scales), model, images, target)
    model, images, targets = bench.model("resnet50"), bench.images(8), bench.targets(8)
    curves = SESSMetric(CentreGaussian()).to(bench.device)  # A map that costs no forward pass.
    bench.ratio("resnet50, 8 images, insertion + deletion", curves, model, images, 1.05)
    full = SESS(GradCAM(), num_scales=6 if bench.quick else 12, prefilter_ratio=0.9)
    some = replace(full, coarse_to_fine=0.3)
    found = bench.times({one: lambda one=one: one(model, images, targets) for one in (full, some)})
    bench.row("resnet50, 8 images, n 12, r .9", "coarse_to_fine=.3 / all", found[some] / found[full], 0.45)


@part
def launches(bench):
    """Kernels by the profiler: an accelerator waits for its host where they are small and many."""
    model = bench.model("resnet50")
    for count in (1, 8):
        images, targets = bench.images(count), bench.targets(count)
        metric = SESSMetric(SESS(GradCAM())).to(bench.device)
        runs = {
            "bare forward": bare_forward(model, [images]),
            "SESS, n 6": lambda: SESS(GradCAM())(model, images, targets),  # noqa: B023
            "SESS, n 12": lambda: SESS(GradCAM(), num_scales=12)(model, images, targets),  # noqa: B023
            "SESSMetric.update": lambda: metric.update(model, images, targets),  # noqa: B023
        }
        for name, run in runs.items():
            run()
            bench.wait()
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
            with profile(activities=kinds) as profiler:
                run()
                bench.wait()
            events = profiler.key_averages()
            kernels, copies, waits = (
                sum(event.count for event in events if word in event.key)
                for word in ("LaunchKernel", "emcpyAsync", "StreamSynchronize")
            )
            note = f"copies {copies}, waits {waits}"
            bench.row(f"resnet50, {count} images, {name}", "kernels launched", kernels, note=note)


@part
def layout(bench):
    """What the layout of model and images costs, and what half precision and compiling would save."""
    for name in ("resnet50", "mobilenet_v2"):
        model, images = bench.model(name), bench.images(128)
        last = bench.model(name).to(memory_format=torch.channels_last)
        nhwc = images.to(memory_format=torch.channels_last)
        found = bench.times({
            "images and weights as they come": bare_forward(model, [images]),
            "images channels last": bare_forward(model, [nhwc]),
            "both channels last": bare_forward(last, [nhwc]),
        })  # fmt: skip
        for kind, value in found.items():
            bench.row(f"{name}, bare, 128 images, {kind}", "ms", value)
    model, images, targets = bench.model("resnet50"), bench.images(8), bench.targets(8)
    method = SESS(GradCAM())
    expected = method(model, images, targets)

    def cast(dtype):
        with torch.autocast(bench.device.type, dtype):
            return method(model, images, targets)

    kinds = {"float32 (TF32 convolutions)": lambda: method(model, images, targets)}
    kinds |= {
        f"autocast {dtype}": lambda dtype=dtype: cast(dtype) for dtype in (torch.bfloat16, torch.float16)
    }
    found = bench.times(kinds)
    for kind, run in kinds.items():
        off = (run() - expected).abs().mean()
        bench.row(
            f"resnet50, SESS n 6, 8 images, {kind}",
            "ms",
            found[kind],
            note=f"maps differ by {off:.2g} in the mean",
        )
    batch = bench.images(128).to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    found = bench.times({"eager": bare_forward(model, [batch]), "compiled": bare_forward(compiled, [batch])})
    bench.row("resnet50, bare, 128 images", "torch.compile / eager", found["compiled"] / found["eager"])


CALLS = []
"""Images in each call of a model; not in the model, where explaining puts everything back."""


class Whole(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        CALLS.append(len(images))
        return self.net(images)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@part
def run(bench):
    """A whole default run, its pictures included."""
    for name in ("resnet50", "resnet18"):
        count = 16 if bench.quick else 1024
        data = TensorDataset(bench.images(count).cpu(), torch.arange(count) % 10)
        loader, seconds, calls = DataLoader(data, 8 if bench.quick else 32), {}, {}
        options = {"num_samples": 2, "num_images": 2} if bench.quick else {}
        for turn in ("without", "warm", "with", "without", "with"):
            module = Whole(bench.model(name))
            CALLS.clear()
            with tempfile.TemporaryDirectory() as folder:
                callbacks = [] if turn == "without" else [SESSCallback(on_error="raise", **options)]
                trainer = pl.Trainer(
                    accelerator="gpu" if bench.device.type == "cuda" else "cpu", devices=1,
                    callbacks=callbacks, logger=CSVLogger(folder), enable_progress_bar=False,
                    enable_model_summary=False,
                )  # fmt: skip
                start = time.perf_counter()
                trainer.validate(module, loader, verbose=False)
                bench.wait()
                taken = time.perf_counter() - start
                seconds[turn] = min(taken, seconds.get(turn, taken))
                calls[turn] = [*CALLS]
        own = sum(calls["with"]) - sum(calls["without"])
        batch = bench.images(8 if bench.quick else 128)
        model = bench.model(name)
        bare = bench.times({"bare": bare_forward(model, [batch])})["bare"] / len(batch) * own / 1e3
        added = seconds["with"] - seconds["without"]
        more = len(calls["with"]) - len(calls["without"])
        note = f"{added:.2f} s for {own} images in {more} calls; bare {bare:.2f} s"
        case = f"{name}, a default run, 32 samples, 8 panels"
        bench.row(case, "seconds added / bare", added / bare, 1.3, note)


@part
def rivals(bench):
    """The same windows by other libraries, r 0."""
    model, images, targets = bench.model("resnet50"), bench.images(1), bench.targets(1)
    method = SESS(GradCAM("layer4"), window=bench.side)
    cut = torch.cat(forwards_of(model, lambda: method(model, images, targets)).batches).contiguous()
    runs = {"SESS": lambda: method(model, images, targets), "bare forward": bare_forward(model, [cut])}
    other = bench.model("resnet50")  # Theirs keep hooks on it, which would cost ours time.
    try:
        import pytorch_grad_cam as foreign

        target = [foreign.utils.model_targets.ClassifierOutputTarget(0)]
        theirs = foreign.GradCAM(other, [other.layer4[-1]])
        runs["grad-cam's GradCAM, a window at a time"] = lambda: [theirs(one, target) for one in cut.split(1)]
        runs["grad-cam's GradCAM, all windows at once"] = lambda: theirs(cut, target * len(cut))
        if hasattr(foreign, "SESS"):
            rival = foreign.SESS(other, [other.layer4[-1]])
            runs["grad-cam's SESS, its defaults"] = lambda: rival(images, target)
    except Exception as error:  # noqa: BLE001
        print(f"grad-cam: {error!r}")
    try:
        from captum.attr import LayerGradCam

        captum = LayerGradCam(other, other.layer4[-1])
        runs["captum's LayerGradCam, all windows at once"] = lambda: captum.attribute(cut, target=0)
    except ImportError as error:
        print(f"captum: {error!r}")
    found = bench.times(runs, rounds=3)
    for name, value in found.items():
        bench.row(
            f"resnet50, 1 image, n 6, {len(cut)} windows: {name}",
            "times SESS",
            value / found["SESS"],
            note=f"{value:.1f} ms",
        )


@part
def table_2(bench):
    """The paper's Table 2 on this card: seconds an image, one image at a time, ResNet-50."""
    model, images, targets = bench.model("resnet50"), bench.images(1), bench.targets(1)

    def seconds(method, rounds=3):
        run = lambda: method(model, images, targets)  # noqa: E731
        return bench.times({"run": run}, rounds)["run"] / 1e3

    scales = (2, 3) if bench.quick else (6, 12)
    for base in (GradCAM(), GuidedBackprop(), GroupCAM()):
        name, given = type(base).__name__, T4[type(base).__name__]
        bench.row(f"Table 2, {name}", "s", seconds(base), note=f"T4 in the paper: {given[0]}")
        for place, ratio in enumerate((0.0, 0.5, 0.99), 1):
            for n in scales:
                method = SESS(base, num_scales=n, prefilter_ratio=ratio)
                bench.row(
                    f"Table 2, {name}, n {n}, r {ratio}", "s", seconds(method), note=f"n 6/12: {given[place]}"
                )
    for method in (RISE(num_masks=16) if bench.quick else RISE(), ScoreCAM(), XRAI()):
        name = type(method).__name__
        try:
            took = seconds(method, 1 if name == "XRAI" else 3)
            bench.row(f"Table 2, {name}", "s", took, note=f"T4 in the paper: {T4[name][0]}")
        except ImportError as error:
            print(f"{name}: {error!r}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("examples/results/gpu.md"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    bench = Bench(args.device, args.quick)
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else "a CPU"
    for name in args.only.split(","):
        start = time.perf_counter()
        try:
            PARTS[name](bench)
        except Exception as error:  # noqa: BLE001 (The other parts still tell something.)
            print(f"{name} failed: {error!r}", flush=True)
            bench.rows.append((name, "failed", "", "", "", f"{type(error).__name__}: {error}"[:200]))
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)
        head = [
            "# On a GPU", "",
            f"Written by `make bench-gpu` on {card}, torch {torch.__version__}; convolutions in TF32,",
            "as torch has it, matrix products in float32.", "",
            "| case | figure | value | target | | |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines = ["| " + " | ".join(row).replace("\n", " ") + " |" for row in bench.rows]
        args.out.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
