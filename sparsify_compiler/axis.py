"""Axes: what the dimensions of tensors are made of, so that it can be told which of them must shrink together.

A dimension is a sum of terms that lie behind each other (a concatenation), a term a product of atoms, outermost first (a reshape of several
dimensions into one). `union` says that two dimensions are the same, index by index; where one of them is finer, the other is split: a
dimension of 768 that is reshaped to 12 x 64 and one that is reshaped to 12 x 64 elsewhere then share both atoms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Atom = int
Term = tuple[Atom, ...]  # a product; the empty one has size 1
Axis = tuple[Term, ...]  # a sum
ONE: Axis = ((),)


class UnevenError(Exception):
    """Two dimensions are of equal size, and cannot be split in the same way."""


@dataclass
class Axes:
    """All atoms of a Program.

    sizes    atom -> size
    parts    atom -> the axis that it was split into
    reasons  atom -> why it cannot shrink
    """

    sizes: list[int] = field(default_factory=list)
    parts: dict[Atom, Axis] = field(default_factory=dict)
    reasons: dict[Atom, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from networkx.utils import UnionFind  # takes longer to import than all of our own modules

        self._same = UnionFind()

    def new(self, size: int, reason: str | None = None) -> Axis:
        """An axis of its own; with a reason, one that cannot shrink."""
        if size == 1:
            return ONE
        self.sizes.append(size)
        atom = len(self.sizes) - 1
        if reason is not None:
            self.reasons[self._same[atom]] = reason
        return ((atom,),)

    def size(self, axis: Axis) -> int:
        """How many indices it has."""
        return sum(math.prod(self.sizes[atom] for atom in term) for term in axis)

    def root(self, atom: Atom) -> Atom:
        """The atom that stands for all that are the same."""
        found: Atom = self._same[atom]
        return found

    def leaves(self, axis: Axis) -> Iterator[Atom]:
        """The roots of the atoms that it is made of, each as often as it is there."""
        for term in axis:
            for atom in term:
                root = self.root(atom)
                if root in self.parts:
                    yield from self.leaves(self.parts[root])
                else:
                    yield root

    def fix(self, axis: Axis, reason: str) -> None:
        """None of it can shrink. The first reason stays."""
        for leaf in self.leaves(axis):
            self.reasons.setdefault(leaf, reason)

    # --- the same -------------------------------------------------------------------------------------------------------------------------

    def union(self, one: Axis, other: Axis, what: str) -> None:
        """The two are the same, index by index; `what` says where. Of those that cannot be split alike nothing can shrink."""
        try:
            self._union(list(one), list(other))
        except UnevenError:
            for axis in (one, other):
                self.fix(axis, f"{what} joins dimensions that are split differently")

    def _union(self, one: list[Term], other: list[Term]) -> None:
        while one and other:
            a, b = self._next(one), self._next(other)
            sizes = self.size((a,)), self.size((b,))
            if sizes[0] > sizes[1]:
                a, rest = self._cut(a, sizes[1])
                one.insert(0, rest)
            elif sizes[0] < sizes[1]:
                b, rest = self._cut(b, sizes[0])
                other.insert(0, rest)
            self._union_terms(list(a), list(b))
        if one or other:
            raise UnevenError

    def _next(self, terms: list[Term]) -> Term:
        """Take the first term, as flat factors of which the outermost is whole: a sum there is spread over the rest of the product."""
        while True:
            factors = self._flat(terms.pop(0))
            if not factors or factors[0] not in self.parts:
                return tuple(factors)
            terms[:0] = [(*term, *factors[1:]) for term in self.parts[factors[0]]]

    def _union_terms(self, one: list[Atom], other: list[Atom]) -> None:
        while one and other:
            one[:], other[:] = self._flat(tuple(one)), self._flat(tuple(other))  # the union before may have split what is still to come
            a, b = one.pop(0), other.pop(0)
            if self.sizes[a] > self.sizes[b]:
                a, rest = self._factor(a, self.sizes[b])
                one[:0] = rest
            elif self.sizes[a] < self.sizes[b]:
                b, rest = self._factor(b, self.sizes[a])
                other[:0] = rest
            self._union_atoms(a, b)

    def _union_atoms(self, a: Atom, b: Atom) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        parts = [self.parts.pop(atom) for atom in (a, b) if atom in self.parts]
        reason = next((self.reasons[atom] for atom in (a, b) if atom in self.reasons), None)
        self._same.union(a, b)
        root = self.root(a)
        if parts:
            self.parts[root] = parts[0]
        if reason is not None:
            self.reasons[root] = reason
            self.fix(((root,),), reason)
        if len(parts) == 2:
            self._union(list(parts[0]), list(parts[1]))

    def _flat(self, term: Term) -> list[Atom]:
        """The factors of a term, products in products taken apart."""
        found: list[Atom] = []
        for atom in term:
            root = self.root(atom)
            parts = self.parts.get(root)
            found += self._flat(parts[0]) if parts is not None and len(parts) == 1 else [root]
        return found

    def _factor(self, atom: Atom, outer: int) -> tuple[Atom, list[Atom]]:
        """An atom as a product whose outermost factor has this size."""
        if self.sizes[atom] % outer or atom in self.parts:
            raise UnevenError
        (first,), (second,) = self.new(outer)[0], self.new(self.sizes[atom] // outer)[0]
        self._split(atom, ((first, second),))
        return first, [second]

    def _cut(self, term: Term, size: int) -> tuple[Term, Term]:
        """A term, as `_next` gives it, as a sum of two, the first of which has this size."""
        inner = self.size((term[1:],))
        if not term or size % inner:
            raise UnevenError
        (first,), (second,) = self.new(size // inner), self.new(self.sizes[term[0]] - size // inner)
        self._split(term[0], (first, second))
        return (*first, *term[1:]), (*second, *term[1:])

    def _split(self, atom: Atom, parts: Axis) -> None:
        self.parts[atom] = parts
        if atom in self.reasons:
            self.fix(parts, self.reasons[atom])

    def cut(self, axis: Axis, size: int) -> tuple[Axis, Axis]:
        """The first `size` indices, and the rest. Raises UnevenError where that goes through a product."""
        first: list[Term] = []
        rest = list(axis)
        while size > 0:
            term = self._next(rest)
            here = self.size((term,))
            if here > size:
                term, other = self._cut(term, size)
                rest.insert(0, other)
            first.append(term)
            size -= min(here, size)
        return tuple(first), tuple(rest)

    # --- indices --------------------------------------------------------------------------------------------------------------------------

    def kept(self, axis: Axis, masks: Mapping[Atom, Tensor]) -> Tensor:
        """bool [size]: which indices stay when of each leaf those of its mask stay; all of a leaf that has none.

        int64, how often each index is there, where masks are int64: how often each unit of the leaf is.
        """
        pieces = []
        for term in axis:
            piece = torch.ones(1, dtype=torch.bool)
            for atom in term:
                root = self.root(atom)
                mine = self.kept(self.parts[root], masks) if root in self.parts else masks.get(root)
                mine = torch.ones(self.sizes[root], dtype=torch.bool) if mine is None else mine
                piece = (piece[:, None] * mine[None, :]).reshape(-1)
            pieces.append(piece)
        return torch.cat(pieces) if pieces else torch.ones(0, dtype=torch.bool)

    def index(self, axis: Axis, masks: Mapping[Atom, Tensor]) -> Tensor:
        """int64: the index that it was before, of each that is there when of each leaf the units of its mask are, or each as often as it says."""
        pieces, start = [], 0
        for term in axis:
            piece, size = torch.zeros(1, dtype=torch.int64), 1
            for atom in term:
                root = self.root(atom)
                mine = self.index(self.parts[root], masks) if root in self.parts else torch.arange(self.sizes[root])
                mine = mine.repeat_interleave(masks[root].long()) if root not in self.parts and root in masks else mine
                piece, size = (piece[:, None] * self.sizes[root] + mine[None, :]).reshape(-1), size * self.sizes[root]
            pieces.append(piece + start)
            start += size
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)

    def units(self, axis: Axis, leaf: Atom) -> Tensor:
        """int64 [size]: which unit of a leaf each index belongs to; -1 where to none."""
        pieces = []
        for term in axis:
            piece = torch.full((1,), -1)
            for atom in term:
                root = self.root(atom)
                if root == leaf:
                    mine = torch.arange(self.sizes[root])
                else:
                    mine = self.units(self.parts[root], leaf) if root in self.parts else torch.full((self.sizes[root],), -1)
                piece = torch.maximum(piece[:, None], mine[None, :]).reshape(-1)
            pieces.append(piece)
        return torch.cat(pieces) if pieces else torch.full((0,), -1)
