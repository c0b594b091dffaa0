"""Runs what is sensitive to numbers as other machines compute it: instruction sets, threads, random order.

Run as ``make test-portable``; ``python tests/_support/portable.py -k SESS`` hands options on to pytest. Every
combination is a process of its own, since the instruction set is chosen as torch is imported.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import randrange
from time import monotonic

import torch

ROOT = Path(__file__).parents[2]
SENSITIVE = [
    "tests/engine", "tests/methods", "tests/metrics", "tests/test_batching.py", "tests/test_ops.py",
    "tests/test_properties.py",
]  # fmt: skip
LEVELS = ["default", "avx2", "avx512"]


@dataclass(frozen=True)
class Machine:
    """What to compute as: ATen's kernels, oneDNN's, and how many threads."""

    aten: str
    onednn: str
    threads: int

    def __str__(self):
        return f"ATEN_CPU_CAPABILITY={self.aten} ONEDNN_MAX_CPU_ISA={self.onednn} threads={self.threads}"

    @property
    def environment(self):
        return {
            **os.environ,
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "OMP_NUM_THREADS": str(self.threads),
            "SESS_TEST_THREADS": str(self.threads),
        }


# Every value of every axis once, and the weakest CPU on both axes, where most differs.
MACHINES = [
    Machine("default", "SSE41", 1),
    Machine("avx2", "AVX2", 2),
    Machine("avx512", "DEFAULT", 4),
    Machine("default", "DEFAULT", 2),
]


def can_be(machine):
    """Forced above what the CPU has, ATen ends in an illegal instruction."""
    has = torch.backends.cpu.get_cpu_capability().lower()
    return LEVELS.index(machine.aten) <= (LEVELS.index(has) if has in LEVELS else 0)


def run(machine, options):
    """Return pytest's exit status and its last line."""
    seed, workers = randrange(2**32), max(1, (os.cpu_count() or 1) // machine.threads)
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-p", "randomly", "-p",
               "no:cacheprovider", f"--randomly-seed={seed}", *options, *SENSITIVE]  # fmt: skip
    told, start, pipe = [], monotonic(), subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, env=machine.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        say(line)
        told.append(line)
    status = process.wait()
    return status, f"{told[-1].strip()} ({monotonic() - start:.0f} s, seed {seed})"


def cpu():
    """Return the kind of CPU, as ``lscpu`` tells it."""
    try:
        told = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no lscpu)"
    found = dict(re.findall(r"^(Architecture|Model name|CPU\(s\)):\s*(.*)$", told, re.MULTILINE))
    return ", ".join(f"{name} {value}" for name, value in found.items())


def versions():
    """Return all that computes."""
    onednn = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    packages = [f"{name} {version(name)}" for name in ("torch", "torchvision", "numpy", "sess-lightning")]
    return ", ".join(
        [f"Python {sys.version.split()[0]}", *packages, f"oneDNN {onednn[1] if onednn else '?'}"]
    )


def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def main(options):
    outcomes = []
    for machine in MACHINES:
        if can_be(machine):
            say(f"\n== {machine}\n")
            outcomes.append((machine, *run(machine, options)))
        else:
            outcomes.append((machine, 0, "left out: this CPU cannot"))
    say(f"\nCPU: {cpu()}; at most {torch.backends.cpu.get_cpu_capability()}\n{versions()}\n")
    for machine, status, last in outcomes:
        say(f"{'FAILED' if status else 'ok    '} {machine}: {last}\n")
    return any(status for _, status, _ in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
