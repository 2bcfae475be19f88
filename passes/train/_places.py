"""Where masks move in training: a weight times its mask, or the values of a weight that is packed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_compiler.anew import Anew
from sparsify_compiler.errors import InputError
from sparsify_compiler.formats._base import Format
from sparsify_compiler.masked import Masked
from sparsify_compiler.packed import Packed
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.training import Marked

if TYPE_CHECKING:
    from sparsify_compiler.passes.train.move_masks import MoveMasks


@dataclass(frozen=True)
class Place:
    """A weight and which of its places are kept; several sites may share it. sparsity: the structure's, or that of the mask when attached."""

    path: str
    taps: tuple[Masked | Packed, ...]
    structure: Structure
    sparsity: float
    known: Mapping[str, Tensor]  # statistics of the calibration

    @property
    def trained(self) -> bool:
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Dense, without a gradient."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """bool of the weight's shape: a copy."""
        raise NotImplementedError

    def beyond(self) -> Tensor:
        """float32 []: the sum of the squares of the weights that are not kept."""
        raise NotImplementedError

    def put(self, mask: Tensor) -> None:
        """Set the mask before training; weights stay."""
        raise NotImplementedError

    def move(self, mask: Tensor, keep: bool) -> Anew:
        """Set the mask. Weights that go, and those that come, are 0 and start anew; with `keep` all go on as they are."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskedPlace(Place):
    """A parameter and a buffer of its shape."""

    parameter: Tensor
    buffer: Tensor

    @property
    def trained(self) -> bool:
        return self.parameter.requires_grad

    def weight(self) -> Tensor:
        return self.parameter.detach()

    def mask(self) -> Tensor:
        return self.buffer.clone()

    def beyond(self) -> Tensor:
        return (self.parameter * ~self.buffer).float().square().sum()

    def put(self, mask: Tensor) -> None:
        self.buffer.copy_(mask)

    def move(self, mask: Tensor, keep: bool) -> Anew:
        fresh = torch.zeros_like(mask) if keep else ~(mask & self.buffer)
        self.buffer.copy_(mask)
        if not keep:
            self.parameter.masked_fill_(fresh, 0)
        return Anew.at(self.parameter, fresh)


@dataclass(frozen=True)
class PackedPlace(Place):
    """Values in a storage format. At an update the weight is dense for a moment, one layer after the other."""

    layer: Packed

    @property
    def trained(self) -> bool:
        return self.layer.values.requires_grad

    def weight(self) -> Tensor:
        return self.layer.stored.decode().detach()

    def mask(self) -> Tensor:
        return self.layer.stored.mask()

    def put(self, mask: Tensor) -> None:
        if bool((mask & ~self.mask()).any()):
            raise InputError("packed weights cannot start with more than the mask keeps: the others are not there any more", where=self.path,
                             hint="leave pack() out, or let the schedule start at its end")
        self._set(mask)

    def move(self, mask: Tensor, keep: bool) -> Anew:
        before = self.layer.stored
        after = self._set(mask)
        return Anew(self.layer.values, before.values.shape, lambda state: carried(before, after, state), needed=True)

    def _set(self, mask: Tensor) -> Format:
        before = self.layer.stored
        after = type(before).encode(before.decode(), mask, **{name: value for name, value in before.attributes().items() if "features" not in name})
        self.layer.put(after)
        return after


def carried(before: Format, after: Format, state: Tensor) -> Tensor:
    """What is known of the values of one form, for those of another: 0 where a place is new."""
    return after.gather(before.scatter(state, state.new_zeros(()))).contiguous()


def places_of(of: MoveMasks, marked: Sequence[Marked]) -> list[Place]:
    """One for each weight."""
    groups: dict[int, list[Marked]] = {}
    for one in marked:
        groups.setdefault(id(one.tap if isinstance(one.tap, Packed) else mask_of(one)), []).append(one)
    return [_place(of, group) for group in groups.values()]


def structure_of(one: Marked, given: Structure | str | None) -> Structure:
    """The given structure, or that with which a pass made the mask; unstructured, where somebody else did before."""
    if isinstance(given, Structure):
        return given
    decision = one.decision
    return Structure.parse(decision.structure if decision is not None and decision.structure not in ("dense", "unknown") else "unstructured")


def mask_of(one: Marked) -> Tensor:
    """The bool buffer among its tensors."""
    return next(tensor for tensor in one.tensors.values() if tensor.dtype == torch.bool)


def _place(of: MoveMasks, group: Sequence[Marked]) -> Place:
    one = group[0]
    packed = one.tap if isinstance(one.tap, Packed) else None
    if packed is not None and (of.straight_through or of.penalty or of.smooth or of.rest or of.backward):
        raise InputError("straight_through, penalty, smooth, rest and backward need the weights that are not kept", where=one.path,
                         hint="leave out pack()")
    if packed is not None and any("correlation" in score.statistics for score in of.scores()):
        raise InputError("packed layers do not correlate what goes through them", where=one.path, hint="leave out pack()")
    if packed is None and len(one.tensors) < 2:
        raise InputError("this weight is computed from others, which its mask cannot start anew", where=one.path,
                         hint="move masks first and add adapters beside them, or let learn_masks() choose")
    mask = mask_of(one) if packed is None else packed.stored.mask()
    structure = structure_of(one, of.structure)
    if of.redistribute and structure.density is not None:
        raise InputError(f"{structure} fixes how many weights a layer keeps", where=one.path, hint="leave out redistribute")
    structure.check(tuple(mask.shape), structure.density or math.nextafter(1, 0))
    if isinstance(of.backward, Structure):
        of.backward.check(tuple(mask.shape), of.backward.density or math.nextafter(1, 0))
    density = structure.share(mask)
    taps = tuple(dict.fromkeys(each.tap for each in group if isinstance(each.tap, Masked | Packed)))
    common = (one.path, taps, structure, 1 - density, one.known)
    if packed is not None:
        return PackedPlace(*common, packed)
    return MaskedPlace(*common, next(tensor for tensor in one.tensors.values() if tensor is not mask), mask)
