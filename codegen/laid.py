"""A weight laid out for a family of kernels, for a machine that need not be this one: the kernels' fixed arguments, and which kernel runs when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparsify_compiler.codegen import build
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target, host

Weight = TypeVar("Weight", bound="PreparedWeight")


class PreparedWeight:
    """A weight laid out for a family of kernels: a dataclass with the tensors named in STATE, which are the kernels' arguments, in this order."""

    STATE: ClassVar[tuple[str, ...]] = ("values", "columns", "pointers", "bias")

    layout: Any         # static facts, the dtype of x and y among them
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        """Of x and y."""
        return getattr(torch, self.layout.dtype)  # type: ignore[no-any-return]

    def settled(self: Weight) -> Weight:
        """The same, its tensors where kernels read them fastest."""
        return replace(self, **{name: resident(getattr(self, name)) for name in self.STATE})  # type: ignore[type-var]

    def arguments(self) -> dict[str, Tensor]:
        """The tensors that kernels are given, by name, in the order of their parameters."""
        return {name: getattr(self, name) for name in self.STATE}

    @property
    def resident_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.arguments().values())


@dataclass(frozen=True)
class PreparedTensors(PreparedWeight):
    """A weight of several tensors, some of which there may not be.

    tensors  by name, in the order of the kernels' parameters
    plain    what torch multiplies many rows with, where kernels take few: in the weight's own dtype, sharing memory with `tensors` where it can
    """

    layout: Any
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    out_features: int
    in_features: int

    def arguments(self) -> dict[str, Tensor]:
        return dict(self.tensors)


def shared_layout(shared: list[Any], bias: Tensor | None, lay_out: Callable[[], Weight], cut: Any = None) -> Weight:
    """The layout with this very bias, cut in this way, from `shared`; made and added where there is none."""
    for held, how, made in shared:
        if held is bias and how == cut:
            return made  # type: ignore[no-any-return]
    shared.append((bias, cut, made := lay_out().settled()))
    return made


@dataclass(frozen=True)
class Variants:
    """The machine code of one bound weight.

    schedules   by name; each is f(x [M, K], *given, *prepared.arguments(), y [M, N]), with other [M, N] before y where it adds
    choose      the name for a number of rows of x
    adds        do they add another tensor?
    """

    schedules: Mapping[str, build.Schedule]
    choose: Callable[[int], str]
    adds: bool = False


@dataclass(frozen=True)
class Laid:
    """A weight laid out for a family of kernels, for a machine that need not be this one: all but the machine code.

    name       for reports
    options    all that the family needs to know to lay the same weight out again
    prepared   the kernels' fixed arguments
    variants   the kernels
    given      names of the op's arguments that kernels are given beside x, behind it, because the graph computes them
    """

    name: str
    options: Mapping[str, Any]
    prepared: PreparedWeight
    variants: Variants
    target: Target
    given: tuple[str, ...] = ()


_elsewhere: ContextVar[bool] = ContextVar("elsewhere", default=False)


@contextmanager
def elsewhere() -> Iterator[None]:
    """What is laid out meanwhile runs without torch, if maybe on this machine."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def without_torch() -> bool:
    """Is what is laid out now to run without torch?"""
    return _elsewhere.get()


def chosen_by(laid: Laid, table: Sequence[Sequence[Any]]) -> Laid:
    """The same weight whose kernels are chosen as it was measured: [most rows, variant], by rising rows; beyond the last by the family's own rule.

    A variant that there is none of (on another number of threads) is left to that rule too.
    """
    known = [(int(most), str(name)) for most, name in table if name in laid.variants.schedules]
    usual = laid.variants.choose

    def choose(rows: int) -> str:
        return next((name for most, name in known if rows <= most), None) or usual(rows)

    return replace(laid, variants=replace(laid.variants, choose=choose))


def workers(target: Target) -> int:
    """Threads among which a kernel for this machine divides its work: torch's own here, elsewhere one for each core."""
    return torch.get_num_threads() if not without_torch() and target.runs_on(host()) else target.cores
