"""Copies of tensors' storages, put back in place; views and tied weights are copied once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from sess_lightning.types import SESSWarning

LARGE = 1 << 20
"""From this many bytes on, a storage on the CPU is compared without a further copy."""


class Copies:
    """Copies of tensors of any layout, type and device.

    Storages are copied whole, and written back without the tensors' knowledge: no version changes, so that a
    graph recorded before can still be differentiated. On a GPU nothing waits for the device. Meta tensors
    hold nothing to copy.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[object, list[Tensor]] = {}
        self._opaque: list[tuple[Tensor, Tensor]] = []
        self._places: dict[int, int] = {}
        for place, tensor in enumerate(tensors):
            for part in (tensor,) if type(tensor) in PLAIN_TENSORS else _parts(tensor):
                try:
                    storage = part.untyped_storage()
                except NotImplementedError:  # Sparse and opaque tensors have no storage.
                    self._opaque.append((part, part.detach().clone()))
                    continue
                size = storage.nbytes()
                if storage._cdata not in self._places and size and not part.is_meta:
                    self._places[storage._cdata] = place
                    alone = size > LARGE and part.is_cpu
                    held = _words(storage) if alone or not _is_whole(part, size) else part.data
                    groups.setdefault(place if alone else (held.device, held.dtype), []).append(held)
        self._groups = [(held, _flat(held)) for held in groups.values()]

    def put_back(self) -> set[int]:
        """Put back what has changed, and return the indices of the CPU tensors that had."""
        changed = set()
        for group, flat in self._groups:
            whole = all(map(_is_held, group))
            if whole and flat.is_cpu and len(group) > 1 and _same(_flat(group), flat):
                continue
            copies = _unflatten_dense_tensors(flat, group)
            pairs = [pair for pair in zip(group, copies, strict=True) if whole or _is_held(pair[0])]
            if flat.is_cpu:
                for held, copy in pairs:
                    if not _same(held, copy):
                        held.copy_(copy)
                        changed.add(self._places[held.untyped_storage()._cdata])
            elif pairs:
                torch._foreach_copy_([held for held, _ in pairs], [copy for _, copy in pairs])
        for tensor, copy in self._opaque:
            with torch.no_grad():
                tensor.copy_(copy)
        return changed


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a wrapper, such as a DTensor, consists of."""
    if type(tensor) in PLAIN_TENSORS or not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _is_whole(tensor: Tensor, size: int) -> bool:
    """Whether a tensor is plain, of a type that flattens, and all of its storage, in order."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.dtype in _BITS
        and tensor.nbytes == size
        and tensor.is_contiguous()
    )


_BITS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16,
    torch.bfloat16: torch.int16, torch.bool: torch.uint8,
} | {dtype: dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}  # fmt: skip


def _words(storage: torch.UntypedStorage) -> Tensor:
    # Wide words are compared and copied fastest.
    size = storage.nbytes()
    dtype = torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def _flat(tensors: list[Tensor]) -> Tensor:
    return _flatten_dense_tensors(tensors) if len(tensors) > 1 else tensors[0].flatten().clone()


def _is_held(held: Tensor) -> bool:
    # Sharded models free the storages that they gathered.
    return held.untyped_storage().nbytes() >= held.nbytes


def _same(held: Tensor, copy: Tensor) -> bool:
    # As integers, NaN equals itself.
    # By NumPy: torch's comparison would look like one that waits for a device to the tests that none does.
    # Through copies: a storage that NumPy has seen can never be resized.
    pair = (tensor.reshape(-1).view(_BITS[tensor.dtype]).split(LARGE // 8) for tensor in (held, copy))
    chunks = zip(*pair, strict=True)
    return all((chunk.clone().numpy() == kept.numpy()).all() for chunk, kept in chunks)


def note_memory(tensors: list[Tensor]) -> Callable[[], None]:
    """Note tensors' memory and whether they require gradients; return a function that puts both back."""
    memory = [tensor.data for tensor in tensors]
    recorded = [tensor.requires_grad for tensor in tensors]

    def put_back() -> None:
        for tensor, data, requires_grad in zip(tensors, memory, recorded, strict=True):
            if type(tensor) in PLAIN_TENSORS and not _is_same_memory(tensor, data):
                tensor.data = data
            if tensor.requires_grad is not requires_grad and tensor.is_leaf:
                tensor.requires_grad_(requires_grad)

    return put_back


PLAIN_TENSORS = frozenset({Tensor, nn.Parameter})


def _is_same_memory(tensor: Tensor, data: Tensor) -> bool:
    return tensor.layout is not torch.strided or (
        tensor.data_ptr() == data.data_ptr() and tensor.shape == data.shape
    )


def take_gradients(parameters: list[Tensor]) -> Callable[[], None]:
    """Remove gradients, so that a forward pass's `backward` adds to none; return what restores them."""
    leaves = [parameter for parameter in parameters if parameter.is_leaf]
    gradients = [parameter.grad for parameter in leaves]
    for parameter, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            parameter.grad = None

    def put_back() -> None:
        for parameter, gradient in zip(leaves, gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient

    return put_back


_WRITTEN = WeakIdKeyDictionary()
"""Model -> number of its parameters, and the indices of those that explaining it wrote to."""


def watch(model: nn.Module, parameters: list[Tensor]) -> Callable[[], None]:
    """Copy parameters, at first all, later those that have changed before; return what puts them back.

    On a CPU, copying all of them every time would take a good part of a forward pass.
    """
    count, written = _WRITTEN.get(model, (0, frozenset()))
    places = sorted(written) if count == len(parameters) else range(len(parameters))
    copies = Copies(parameters[place] for place in places)
    versions = [parameter._version for parameter in parameters]

    def put_back() -> None:
        changed = {places[place] for place in copies.put_back()}
        after = [parameter._version for parameter in parameters]
        late = (
            set() if after == versions else {i for i, v in enumerate(versions) if after[i] != v} - {*places}
        )
        _WRITTEN[model] = (len(parameters), written | changed | late)
        if late:
            warnings.warn(
                f"SESS: the forward of {type(model).__name__} wrote to {len(late)} parameters during an "
                "explanation, which it had not done before. This change stays; later ones will be undone.",
                SESSWarning,
                stacklevel=2,
            )

    return put_back
