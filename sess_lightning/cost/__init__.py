"""What explaining costs: exact forward passes (``budget``) and measured time (``measure``)."""

from sess_lightning.cost.measure import RATIOS, SAMPLES, SCALES, SHARES, Costs, Knob, Part, measure_cost
from sess_lightning.cost.measuring import (
    MOST_RECORDED,
    Forwards,
    alternate,
    bare_copy,
    bare_forward,
    forwards_of,
    machine,
    peak_bytes,
)

__all__ = [
    "MOST_RECORDED",
    "RATIOS",
    "SAMPLES",
    "SCALES",
    "SHARES",
    "Costs",
    "Forwards",
    "Knob",
    "Part",
    "alternate",
    "bare_copy",
    "bare_forward",
    "forwards_of",
    "machine",
    "measure_cost",
    "peak_bytes",
]
