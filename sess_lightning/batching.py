"""Batching: how many images pass through a model at once, and what happens when that is too many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sess_lightning.ops import is_out_of_memory, size_of
from sess_lightning.types import SESSWarning

Item = TypeVar("Item")
Result = TypeVar("Result")

ON_CPU, ON_CPU_PIXELS, MOST_ON_CPU = 8, 8 * 128 * 128, 64
"""Batch size where free memory is unknown: 8, or as many small images as have that many pixels, up to 64.

Larger batches overflow a CPU's caches; in smaller ones a convolution lays out its weights for few pixels.
ResNet-18 takes .37 of the time in batches of 64 instead of 8 at 32 px, .67 in batches of 32 at 64 px.
"""
MOST = 128
BYTES_PER_BYTE = 64
"""Peak memory of a forward pass without gradients, as a multiple of its images: VGG-16 45, ResNet-50 25."""

_WATCHER: ContextVar[Callable[[int], None] | None] = ContextVar("_WATCHER", default=None)


@contextmanager
def watched(tick: Callable[[int], None]) -> Iterator[None]:
    """Call ``tick`` with the number of items after each batch that has passed in this context."""
    token = _WATCHER.set(tick)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def batch_limit(
    given: int | None, images: Float[Tensor, "B C H W"], size: tuple[int, int] | None = None
) -> int:
    """Return how many images like these may pass at once: ``given``, or what half of the free memory holds.

    Args:
        given: What the user asked for; None if nothing.
        images: Images.
        size: (height, width) of what passes, if not that of the images.

    Raises:
        ValueError: If ``given`` is not at least 1.
    """
    if given is not None:
        if given < 1:
            raise ValueError(f"batch_size must be at least 1, got {given}; None takes what memory allows.")
        return given
    free, (height, width) = _free_bytes(images.device), size or size_of(images)
    if free is None:
        return max(ON_CPU, min(MOST_ON_CPU, ON_CPU_PIXELS // (height * width)))
    bytes_each = BYTES_PER_BYTE * images.shape[1] * height * width * images.element_size()
    return max(1, min(MOST, free // 2 // bytes_each))


def _free_bytes(device: torch.device) -> int | None:
    """Return an accelerator's free memory, its cache included; None if unknown."""
    # Without an accelerator, torch 2.6 raises on everything but `is_available`.
    if device.type in ("cpu", "meta") or not torch.accelerator.is_available():
        return None
    backend = torch.get_device_module(device)
    if device.type == "mps":
        return int(backend.recommended_max_memory() - backend.current_allocated_memory())
    if not hasattr(backend, "mem_get_info"):
        return None
    try:
        free = backend.mem_get_info(device)[0]
    except RuntimeError:  # Some Intel GPUs do not say.
        return None
    return int(free + backend.memory_reserved(device) - backend.memory_allocated(device))


def in_batches(
    run: Callable[[list[Item], slice], Result], items: Iterable[Item], size: int
) -> Iterator[Result]:
    """Yield the results of ``run`` on full batches of ``items``; the last one may be smaller.

    When memory runs out, the batch is halved, with one warning, and work continues from there.

    Args:
        run: Takes a batch of items, and the slice of all items that they are.
        items: Consumed one batch at a time.
        size: Items in a batch, to begin with.

    Raises:
        RuntimeError: If ``run`` is out of memory with a single item.
    """
    items, place, warned = iter(items), 0, False
    while held := list(islice(items, size)):
        while held:
            part = held[:size]
            try:
                result = run(part, slice(place, place + len(part)))
            except RuntimeError as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                size, reason = len(part) // 2, str(error).partition("\n")[0]
                if not warned:
                    warnings.warn(
                        f"Out of memory with {len(part)} images at once ({reason}); continuing with {size}. "
                        "Set a smaller batch_size to avoid the failed attempt.",
                        SESSWarning,
                        stacklevel=2,
                    )
                warned = True
                continue
            if (tick := _WATCHER.get()) is not None:
                tick(len(part))
            yield result
            held, place = held[len(part) :], place + len(part)


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Return the results of batches as one; that of a single batch is not copied."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first


def stacked(items: Sequence[Tensor]) -> Tensor:
    """Stack items; images lie with their channels last, the layout convolutions are fastest in."""
    if items[0].ndim != 3:
        return torch.stack(tuple(items))
    return torch.stack(tuple(items), out=blank_batch(len(items), items[0][None]))


def blank_batch(count: int, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "{count} C H W"]:
    """Return an uninitialised batch of ``count`` images like these."""
    size = (count, *images.shape[1:])
    return torch.empty(size, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def by_image(which: slice, each: int) -> Iterator[tuple[int, slice, slice]]:
    """Split a slice of items, ``each`` of every image: yield image, its items, their places in the slice."""
    for image in range(which.start // each, -(-which.stop // each)):
        start, stop = max(which.start, image * each), min(which.stop, (image + 1) * each)
        items = slice(start - image * each, stop - image * each)
        yield image, items, slice(start - which.start, stop - which.start)
