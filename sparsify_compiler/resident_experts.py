"""Experts that stay on disk until a text chooses them: how many bytes of them are in memory at a time is bounded, and those used last stay.

A mixture whose call chooses more experts than the bound holds computes them in turns. What leaves memory is given back to the system page by page
(madvise), which reads it from the file again when it is chosen again: so the file must stay as it is, and nobody may write to these weights.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from .errors import InputError
from .ops import experts_ffn
from .program import Program

WEIGHTS = ("gate", "up", "down")
DROP = getattr(mmap, "MADV_DONTNEED", None)
WINDOW = 16 * mmap.PAGESIZE  # what Linux maps at one read of a file that it has in memory (fault_around_bytes)
Expert = tuple[int, int]  # number of a mixture, and of its expert


@dataclass
class ResidentExperts:
    """The experts of all mixtures of a model that may be in memory, the one that was used last at the end.

    bound   bytes that they have together at most, with what the system maps around them
    bytes   that they have now
    reads   experts that came from disk so far, and those that were still there
    """

    bound: int
    bytes: int = 0
    reads: dict[str, int] = field(default_factory=lambda: {"from disk": 0, "in memory": 0})
    _held: OrderedDict[Expert, int] = field(default_factory=OrderedDict)
    _places: dict[int, list[Tensor]] = field(default_factory=dict)

    def turns(self, mixture: int, experts: Iterable[int]) -> Iterator[list[int]]:
        """The experts, in parts that fit; each is counted as in memory while it is handed out, and others went for it.

        Those that are in memory come first. Raises InputError where one alone does not fit.
        """
        wanted = sorted(experts, key=lambda expert: (mixture, expert) not in self._held)
        part, size = list[int](), 0
        for expert in wanted:
            own = self.size(mixture, expert)
            if own > self.bound:
                raise InputError(f"one expert has {own} bytes, more than the {self.bound} that may be in memory", where=f"mixture {mixture}",
                                 hint=f"load(..., experts_bytes={own}) at least")
            if size + own > self.bound:
                yield self._taken(mixture, part)
                part, size = [], 0
            part.append(expert)
            size += own
        if part:
            yield self._taken(mixture, part)

    def add(self, mixture: int, weights: list[Tensor]) -> None:
        """A mixture's weights [E, ...], each expert of which lies in one piece."""
        self._places[mixture] = weights

    def _taken(self, mixture: int, experts: list[int]) -> list[int]:
        mine = {(mixture, expert) for expert in experts}
        fresh = sum(self.size(*one) for one in mine if one not in self._held)
        while self.bytes + fresh > self.bound:
            oldest = next(one for one in self._held if one not in mine)
            self._drop(oldest)
        for one in sorted(mine):
            self.reads["in memory" if one in self._held else "from disk"] += 1
            if one not in self._held:
                self._held[one] = self.size(*one)
                self.bytes += self._held[one]
            self._held.move_to_end(one)
        return experts

    def size(self, mixture: int, expert: int) -> int:
        """With all that the system may bring along, of neighbours, too."""
        return sum(stop - start for start, stop in (_reach(weight[expert]) for weight in self._places[mixture]))

    def _drop(self, one: Expert) -> None:
        self.bytes -= self._held.pop(one)
        for weight in self._places[one[0]]:
            start, stop = _reach(weight[one[1]])
            if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DROP):
                raise InputError("the system does not take pages back", where="experts on disk", hint="load without experts_bytes")


class Bounded:
    """A kernel of a mixture under the bound; otherwise the kernel itself."""

    def __init__(self, kernel: Any, mixture: int, resident: ResidentExperts, experts: int) -> None:
        self._kernel, self._mixture, self._resident, self.experts = kernel, mixture, resident, experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_kernel"], name)

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:
        """A y for this x, which may be fake. Raises InputError."""
        found: Tensor = self._kernel.empty(x, *given)
        return found

    @property
    def signature(self) -> str:
        """As the kernel's."""
        return str(self._kernel.signature)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
        """As the kernel; sums over experts that come in turns are taken in float32. Raises InputError."""
        named = [expert for expert in torch.unique(chosen).tolist() if 0 <= expert < self.experts]
        total: Tensor | None = None
        for part in self._resident.turns(self._mixture, named):
            whole = len(part) == len(named)
            only = chosen if whole else torch.where(torch.isin(chosen, torch.tensor(part, dtype=chosen.dtype)), chosen, -1)
            y = self._kernel(x, only, weights)
            total = y if whole else y.float() if total is None else total.add_(y)
        if total is None:
            total = self._kernel(x, chosen, weights)
        return total.to(x.dtype)


def bound_experts(program: Program, bound: int, file: int) -> ResidentExperts:
    """Let every mixture of a loaded program keep to `bound` bytes together, in place. Raises InputError where one cannot, or there is none.

    file  bytes of the file that all weights are mapped from, whole
    """
    resident = ResidentExperts(bound)
    found: list[fx.Node] = [node for _, node in program.nodes() if node.target is experts_ffn.op]
    if not found or DROP is None or os.name != "posix":
        raise InputError("the model has no mixture of experts" if not found else "this system does not take pages back", where="experts_bytes")
    for number, node in enumerate(found):
        kernel = node.meta.get("kernel")
        weights = _on_disk(kernel, file)
        if not weights:
            raise InputError("this mixture has no kernel that reads its experts in the file, where they lie",
                             where=str(node.meta.get("path", node.name)),
                             hint="load without experts_bytes, or compile it with lower() on this machine")
        resident.add(number, weights)
        node.meta["kernel"] = Bounded(kernel, number, resident, weights[0].shape[0])
    smallest = max(resident.size(number, expert) for number, node in enumerate(found) for expert in range(node.meta["kernel"].experts))
    if smallest > bound:
        raise InputError(f"one expert has {smallest} bytes, more than the {bound} that may be in memory", where="experts_bytes",
                         hint=f"experts_bytes={smallest} at least")
    return resident


def _on_disk(kernel: Any, file: int) -> list[Tensor]:
    """The weights that a kernel reads in the file, an expert in one piece; none where it reads another copy of one, which must not be dropped."""
    state: dict[str, Tensor] = {} if kernel is None else kernel.state()
    found = [(state[name], state.get(f"prepared.{name}", state[name])) for name in WEIGHTS if name in state]
    fits = all(weight.is_cpu and weight[0].is_contiguous() and weight.untyped_storage().nbytes() == file and read.data_ptr() == weight.data_ptr()
               for weight, read in found)
    return [weight for weight, _ in found] if fits else []


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Where that begins and ends, in the file, which is in memory once a contiguous part of it was read: the system maps pages in windows."""
    storage, start = tensor.untyped_storage(), tensor.data_ptr()
    first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    stop = -(-(start + tensor.numel() * tensor.element_size()) // WINDOW) * WINDOW
    return max(start // WINDOW * WINDOW, first), min(stop, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
