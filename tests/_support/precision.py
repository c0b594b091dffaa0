"""All that says how precise float32 products are: the fields of torch 2.9 and later, and the old switches."""

from functools import partial

import torch

BACKENDS = {
    "backends": torch.backends,
    "cuda": torch.backends.cuda,
    "cudnn": torch.backends.cudnn,
    "mkldnn": torch.backends.mkldnn,
}


def _owners():
    for label, backend in BACKENDS.items():
        yield label, backend
        for name in ("matmul", "conv", "rnn"):
            if hasattr(backend, name):
                yield f"{label}.{name}", getattr(backend, name)


def _read(get):
    try:
        return get()
    except AttributeError:
        return "no such field"
    except RuntimeError as error:
        return f"raises: {error}"  # Old and new fields contradict each other.


def precision_flags():
    """Return name -> value, or what reading it raises."""
    flags = {
        f"{label}.{field}": _read(partial(getattr, owner, field))
        for label, owner in _owners()
        for field in ("fp32_precision", "allow_tf32")
    }
    return {**flags, "matmul": _read(torch.get_float32_matmul_precision)}


def reset_precision():
    """Put back what a fresh process has."""
    with_field = [owner for _, owner in _owners() if hasattr(owner, "fp32_precision")]
    for owner in with_field:  # Contradictions first: they would make the old switches raise.
        owner.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for owner in with_field:
        owner.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
