"""The tensors of an adapter in few blocks of memory, so that they are copied with few copies.

Hundreds of small tensors cost hundreds of calls to pin, copy or free them; a block costs one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lorafold_adapters.binding import BoundAdapter

BLOCK_BYTES = 16 << 20
"""Of one block, unless a tensor is larger. torch rounds pinned memory up to a power of two, which this is already."""
ALIGNMENT = 256
"""Bytes that every tensor begins at a multiple of."""


def packed(bound: BoundAdapter, empty: Callable[[int], Tensor]) -> BoundAdapter:
    """A copy of the adapter in blocks; `empty` gives one of so many bytes, as a tensor of them."""
    left = sum(room_of(tensor) for tensor in bound.tensors())
    block, used = empty(0), 0

    def put(tensor: Tensor) -> Tensor:
        nonlocal left, block, used
        room = room_of(tensor)
        if used + room > len(block):
            block, used = empty(max(room, min(left, BLOCK_BYTES))), 0
        place = block[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        used, left = used + room, left - room
        return place.copy_(tensor)

    return bound.mapped(put)


def moved(bound: BoundAdapter, copy: Callable[[Tensor], Tensor]) -> BoundAdapter:
    """The adapter with each of its blocks copied by `copy`, which gets it as a tensor of bytes."""
    copies: dict[int, Tensor] = {}

    def of_copy(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copies[storage.data_ptr()] = copy(whole)
        block = copies[storage.data_ptr()]
        view = torch.empty(0, dtype=tensor.dtype, device=block.device)
        return view.set_(block.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    return bound.mapped(of_copy)


def room_of(tensor: Tensor) -> int:
    """Bytes that a tensor takes in a block."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
