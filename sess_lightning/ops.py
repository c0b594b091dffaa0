"""Tensor in, tensor out: normalise, resize and blur. Nothing here waits for the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

ROUNDING = 1e-6
"""Share of a map's peak that counts as 0: float32 leaves about 1e-7 where the exact value is 0."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep our own arithmetic in float32, whatever autocast or precision setting the training runs under."""
    kind = device.type if device.type != "meta" else "cpu"
    with _exact_products(kind), torch.autocast(kind, enabled=False):
        yield


@contextmanager
def _exact_products(kind: str) -> Iterator[None]:
    """Switch the device's matrix products to float32 if less is allowed, and switch back afterwards.

    Since torch 2.9 each backend has its own field, and the old global switch raises or reports something else
    once a field has been set: if the field exists, only it is read and written.
    """
    backend = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    products: Any = getattr(backend, "matmul", None)
    if not hasattr(products, "fp32_precision"):
        with _exact_products_before_torch_2_9():
            yield
        return
    before = products.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        # An unset field shows what a broader one says, torch.backends.fp32_precision: let that go on ruling.
        products.fp32_precision = "none"
        if products.fp32_precision != before:
            products.fp32_precision = before


@contextmanager
def _exact_products_before_torch_2_9() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sent(numbers: Sequence[Any], device: torch.device) -> Int[Tensor, ...]:
    """Return whole numbers as a tensor on a device; ``torch.tensor(device=)`` would wait for it."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def wait_for(device: torch.device | str) -> None:
    """Wait until a device has finished; a CPU always has."""
    # torch 2.6 raises where there is none; later versions return None.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type == torch.device(device).type:
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is out of memory, by its type or by the backend's message."""
    words = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error).lower() for word in words
    )


def size_of(images: Tensor) -> tuple[int, int]:
    """Return (height, width)."""
    return images.shape[-2], images.shape[-1]


def min_max(maps: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
    """Stretch each map to [0, 1]; one that is flat up to rounding, or not finite, becomes zeros."""
    low, high = maps.flatten(1).aminmax(dim=1)
    return _stretch(maps, low[:, None, None], high[:, None, None])


def min_max_upsampled(
    maps: Float[Tensor, "B h w"], size: tuple[int, int]
) -> tuple[Float[Tensor, "B h w"], Float[Tensor, "B 2"]]:
    """Scale coarse maps so that their bilinear upsampling to ``size`` is what ``min_max`` makes of it.

    Bilinear weights sum to 1, so a shift and a gain may be applied before upsampling as well as after.

    Returns:
        The scaled maps, and the lowest and highest value of each map once upsampled.
    """
    corners = maps
    if maps.shape[-2:] != size:
        # Between two lines of the coarse grid the surface is bilinear, with its extremes next to lines.
        rows, columns = (_next_to_lines(maps.shape[i], size[i], maps.device).to(maps.dtype) for i in (-2, -1))
        with full_precision(maps.device):
            corners = (maps @ columns).mT @ rows
    low, high = corners.flatten(1).aminmax(dim=1)
    return _stretch(maps, low[:, None, None], high[:, None, None]), torch.stack([low, high], 1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _next_to_lines(source: int, target: int, device: torch.device) -> Float[Tensor, "{source} n"]:
    """Return the columns of ``resize_matrix``'s transpose whose samples lie next to one of the source's."""
    # In units of 1 / (2 * target) of a source sample, as in `resize_matrix`.
    unit = 2 * target
    cells = [min(max(0, (2 * j + 1) * source - target), (source - 1) * unit) // unit for j in range(target)]
    turns = [j for j in range(1, target) if cells[j - 1] != cells[j]]
    chosen = sorted({0, *turns, *(j - 1 for j in turns), target - 1})
    rows = resize_matrix(source, target, device)
    return torch.stack([rows[j] for j in chosen], 1)


def _stretch(maps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    span = high - low
    # A gain above 1 / tiny would overflow: subnormal spans count as flat.
    is_flat = _beyond_rounding(span, low, high) <= torch.finfo(maps.dtype).tiny
    return ((maps - low) / span).masked_fill(is_flat, 0)


def has_span(low: Tensor, high: Tensor) -> Tensor:
    """Return whether the lowest and the highest value differ by more than rounding.

    False as well where one of them is NaN or infinite.
    """
    return _beyond_rounding(high - low, low, high) > 0


def _beyond_rounding(span: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return span.sub(torch.maximum(-low, high), alpha=ROUNDING).nan_to_num(0, 0, 0)


def upsample(maps: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """Resize bilinearly, half-pixel centres, no antialias; the same size is returned untouched."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def resize(
    images: Float[Tensor, "B C h w"], size: tuple[int, int], antialias: bool = True
) -> Float[Tensor, "B C H W"]:
    """Resize bilinearly, half-pixel centres, in float32; the same size is returned untouched."""
    if images.shape[-2:] == size:
        return images
    resized = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=antialias)
    return resized.to(images.dtype)


def resize_matrix(
    source: int, target: int, device: torch.device, antialias: bool = False
) -> Float[Tensor, "{target} {source}"]:
    """Return the matrix that resizes a column of ``source`` samples to ``target``, as ``resize`` does.

    Bilinear resizing is linear and separable, so an image resizes as ``rows @ image @ columns.T``, and any
    part of the result needs only its own rows and columns. Positions are kept as exact integers, in units
    of 1 / (2 * target) of a source sample.
    """
    unit = 2 * target
    centres = (2 * torch.arange(target, device=device) + 1) * source - target
    if not (antialias and source > target):
        centres = centres.clamp(0, (source - 1) * unit)
    distance = (centres[:, None] - unit * torch.arange(source, device=device)).abs()
    reach = 2 * source if antialias and source > target else unit
    weights = (reach - distance).clamp(min=0).to(torch.float32)
    return weights / weights.sum(1, keepdim=True)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def gaussian_matrix(
    size: int, kernel_size: int, sigma: float, device: torch.device
) -> Float[Tensor, "{size} {size}"]:
    """Return the matrix that blurs a column of ``size`` samples, border mirrored without the edge sample."""
    offsets = torch.arange(kernel_size, device=device) - kernel_size // 2
    kernel = torch.exp(-(offsets.to(torch.float32) ** 2) / (2 * sigma**2))
    reached = torch.arange(size, device=device)[:, None] + offsets
    period = max(1, 2 * (size - 1))
    reached = reached % period
    reached = torch.minimum(reached, period - reached)
    weights = (kernel / kernel.sum()).expand(size, -1)
    # Given explicitly: a Trainer in half precision changes the default.
    empty = torch.zeros(size, size, device=device, dtype=torch.float32)
    return empty.scatter_add_(1, reached, weights)


def blur(
    images: Float[Tensor, "*B H W"], kernel_size: int = 11, sigma: float = 5.0
) -> Float[Tensor, "*B H W"]:
    """Blur with a square Gaussian kernel, reflect-101 border.

    Args:
        images: Any range; the result is float32.
        kernel_size: Side of the kernel, px, odd.
        sigma: Standard deviation of the kernel, px.

    Raises:
        ValueError: If ``kernel_size`` is even or ``sigma`` is not positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"blur: kernel_size must be odd and positive, got {kernel_size}.")
    if sigma <= 0:
        raise ValueError(f"blur: sigma must be positive, got {sigma}.")
    rows, columns = (gaussian_matrix(n, kernel_size, sigma, images.device) for n in images.shape[-2:])
    with full_precision(images.device):
        return rows @ images.to(torch.float32) @ columns.T


def upper_percentile(maps: Float[Tensor, "B h w"], percent: float) -> Float[Tensor, " B"]:
    """Return a high percentile of each map, linearly interpolated; only the values above it are sorted.

    Raises:
        ValueError: If ``percent`` is not in [0, 100].
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percent}.")
    values = maps.flatten(1)
    place = percent / 100 * (values.shape[1] - 1)
    below = int(place)
    top = values.topk(values.shape[1] - below, dim=1).values
    above = top[:, -2] if top.shape[1] > 1 else top[:, -1]
    return torch.lerp(top[:, -1], above, place - below)
