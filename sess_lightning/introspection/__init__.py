"""How a classifier is read (logits, layers, features) and borrowed (lending)."""

from sess_lightning.introspection.grids import Grid, find_grid
from sess_lightning.introspection.hooks import (
    Tap,
    first_tensor,
    gradient,
    head_forward,
    recording,
    with_first_tensor,
)
from sess_lightning.introspection.layers import (
    OnGrid,
    find_target_layer,
    read_features,
    resolve_layer,
)
from sess_lightning.introspection.logits import (
    check_inputs,
    classify,
    log_scores,
    logits_of,
    predict,
    score,
    target_logits,
)
from sess_lightning.introspection.sizes import input_window

__all__ = [
    "Grid",
    "OnGrid",
    "Tap",
    "check_inputs",
    "classify",
    "find_grid",
    "find_target_layer",
    "first_tensor",
    "gradient",
    "head_forward",
    "input_window",
    "log_scores",
    "logits_of",
    "predict",
    "read_features",
    "recording",
    "resolve_layer",
    "score",
    "target_logits",
    "with_first_tensor",
]
