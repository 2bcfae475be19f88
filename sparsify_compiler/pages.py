"""Memory for weights that kernels read once a call: in huge pages, where the system gives them.

A weight that comes from memory is then read a tenth to a fifth faster: the processor looks up one page instead of 512, and reads ahead across them.
Weights lie next to each other in rooms of many huge pages; the place of one that is gone is given to another.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from threading import Lock

import torch
from torch import Tensor

HUGE = 1 << 21      # bytes of a huge page of x86 and of most ARM systems
ROOM = 16 * HUGE    # what is asked for at once; untouched pages take no memory
SMALLEST = 1 << 16  # bytes below which a weight stays where it is
ALIGNED = 1 << 12
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_lock = Lock()


class _Room:
    """Some huge pages, and which parts of them are free: [begin, end) in order, none next to another."""

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        first = -address % HUGE
        memory.madvise(_ADVICE, first, size)  # type: ignore[arg-type]
        self.memory, self.range = memoryview(memory), range(address + first, address + first + size)
        self.free = [(first, first + size)]
        self.returned: deque[tuple[int, int]] = deque()  # the collector may run, and return a place, while another is looked for

    def take(self, size: int) -> memoryview | None:
        """That many bytes, returned when nobody refers to them any more; None where no free part is as large."""
        self.tidy()
        size += -size % ALIGNED
        for place, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[place:place + 1] = [(begin + size, end)] if end - begin > size else []
                part = self.memory[begin:begin + size]
                weakref.finalize(part, _return, self, begin, begin + size).atexit = False
                return part
        return None

    def tidy(self) -> None:
        """What was returned is free again, and free neighbours are one."""
        joined: list[tuple[int, int]] = []
        for part in sorted([*self.free, *(self.returned.popleft() for _ in range(len(self.returned)))]):
            if joined and joined[-1][1] == part[0]:
                joined[-1] = (joined[-1][0], part[1])
            else:
                joined.append(part)
        self.free = joined


def _return(room: _Room, begin: int, end: int) -> None:
    room.returned.append((begin, end))


_rooms: weakref.WeakSet[_Room] = weakref.WeakSet()  # each is held by what lies in it


def resident(tensor: Tensor) -> Tensor:
    """A contiguous copy of the tensor in huge pages; the tensor itself, contiguous, where it is small, there already, or the system has none."""
    tensor = tensor.detach().contiguous()
    size = tensor.numel() * tensor.element_size()
    if size < SMALLEST or _ADVICE is None or not tensor.is_cpu:
        return tensor
    with _lock:
        if any(tensor.data_ptr() in room.range for room in _rooms):
            return tensor
        part = _part(size)
    if part is None:
        return tensor
    return torch.frombuffer(part, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)


def _part(size: int) -> memoryview | None:
    """Room for so many bytes; None where the system has none, or does not know huge pages."""
    found = next((part for room in _rooms if (part := room.take(size)) is not None), None)
    if found is None:
        try:
            room = _Room(max(ROOM, -(-size // HUGE) * HUGE))
        except OSError:
            return None
        _rooms.add(room)
        found = room.take(size)
    return found
