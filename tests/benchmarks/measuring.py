"""What the benchmarks share: arguments, networks, and the table in examples/results that they write."""

import argparse
import csv
import time
from pathlib import Path
from statistics import median

import torch
from torchvision.models import get_model

from sess_lightning.cost.measuring import alternate, machine

RESULTS = Path(__file__).parents[2] / "examples" / "results" / "benchmarks.csv"
FIELDS = ["benchmark", "case", "figure", "value", "lowest", "highest", "target", "met",
          "rounds", "clock", "device", "threads", "versions"]  # fmt: skip


class Bench:
    """One benchmark's run: prints each figure as it comes, and keeps them if the run was a full one."""

    def __init__(self, file, what, **arguments):
        self.name = Path(file).stem.removeprefix("bench_")
        parser = argparse.ArgumentParser(description=what)
        parser.add_argument("--quick", action="store_true", help="the smallest case, once; nothing is kept")
        parser.add_argument("--rounds", type=int, default=3, help="alternations")
        for name, options in arguments.items():
            parser.add_argument(f"--{name}", **options)
        self.args = parser.parse_args()
        self.quick, self.rounds = self.args.quick, 1 if self.args.quick else self.args.rounds
        # With one thread, the processor's own time leaves out what other processes take from it.
        alone = torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter
        self.facts = {
            "rounds": self.rounds,
            "clock": "processor time" if alone else "wall time",
            **machine(),
        }
        self.rows = []
        print(f"{self.name}: {what}\n  {self.facts}", flush=True)

    def time(self, runs):
        """Return the seconds of every round by name."""
        return alternate(runs, self.rounds, clock=self.clock)

    def ratio(self, case, figure, part, floor, *, most=None, least=None):
        """Note how many times longer one took than another, both round by round."""
        ratios = [a / b for a, b in zip(part, floor, strict=True)]
        self.note(case, figure, median(ratios), min(ratios), max(ratios), most=most, least=least)

    def note(self, case, figure, value, lowest=None, highest=None, *, most=None, least=None):
        target, met = "", ""
        if most is not None or least is not None:
            target = f"<= {most}" if most is not None else f">= {least}"
            met = "met" if (value <= most if most is not None else value >= least) else "MISSED"
        shown = [v if v is None else float(f"{v:.4g}") for v in (value, lowest, highest)]
        row = [self.name, case, figure, *shown, target, met]
        self.rows.append({**dict(zip(FIELDS, row, strict=False)), **self.facts})
        spread = f" [{lowest:.4g}, {highest:.4g}]" if lowest is not None else ""
        print(f"  {case}: {figure} {value:.4g}{spread} {target} {met}".rstrip(), flush=True)
        if not self.quick:
            self.keep()

    def keep(self):
        """Put this benchmark's rows in place of those of its last run, case by case."""
        new = {(row["benchmark"], row["case"], row["figure"]) for row in self.rows}
        held = []
        if RESULTS.is_file():
            with RESULTS.open(newline="") as file:
                held = [
                    row
                    for row in csv.DictReader(file)
                    if (row["benchmark"], row["case"], row["figure"]) not in new
                ]
        rows = sorted([*held, *self.rows], key=lambda row: row["benchmark"])
        fresh = RESULTS.with_suffix(f".{self.name}")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        fresh.replace(RESULTS)
        RESULTS.with_suffix(".md").write_text(markdown(rows))


def markdown(rows):
    """Return the table for people."""
    lines = ["# Benchmarks", "", "Written by `make bench`; every figure with the range over its rounds.", ""]
    lines += ["| benchmark | case | figure | value | range | target | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['lowest']} – {row['highest']}" if row["lowest"] not in (None, "") else ""
        cells = [
            row["benchmark"],
            row["case"],
            row["figure"],
            row["value"],
            spread,
            row["target"],
            row["met"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    facts = {tuple(f"{name}: {row[name]}" for name in FIELDS[9:]): None for row in rows}
    return "\n".join([*lines, "", *("- " + "; ".join(fact) for fact in facts), ""])


def network(name, **options):
    """Return a torchvision network with random weights, channels last."""
    torch.manual_seed(0)
    return get_model(name, weights=None, **options).eval().to(memory_format=torch.channels_last)


def noise(height=224, width=None, count=1):
    return torch.rand(count, 3, height, width or height, generator=torch.Generator().manual_seed(0))


ZERO = torch.tensor([0])
