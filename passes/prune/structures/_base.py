"""What every structure is: a rule of which weights may be kept together, and how the best of them are chosen from a score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.errors import ParseError, SparsifyError, StructureError

SLACK = 1e-6  # density * total may miss a whole number by float rounding: 0.1 * 30 is 3.0000000000000004


@dataclass(frozen=True)
class Structure:
    """Which elements of a weight may be kept together.

    A weight is seen as [out, in]; convolutions as [out, in * kh * kw]. `str()` gives the shorthand that `Structure.parse` reads.
    """

    hint: ClassVar[str] = "mask_weights(on_misfit='skip') leaves such layers dense"

    @property
    def density(self) -> float | None:
        """The density that the structure fixes by itself (n/m), or None when it is free."""
        return None

    @property
    def loose(self) -> Structure:
        """What may be dropped from a mask of this structure, where as many others then come in that it is one again; itself by default."""
        return self

    def groups(self, rows: int, columns: int) -> Tensor:
        """int64 [rows, columns]: weights of the same number, from 0 on, are kept or cut together; by default each is alone."""
        return torch.arange(rows * columns).view(rows, columns)

    def contests(self, rows: int, columns: int) -> int:
        """Into how many equal runs of numbers groups() falls, each of which keeps its own share; one by default, the layer."""
        return 1

    def share(self, mask: Tensor) -> float:
        """The density at which mask() keeps as much as a mask [out, in, ...] does: of its weights, or of the groups, where the last is smaller.

        Of a structure that fixes its own it is that, of which a padded mask has a little more.
        """
        if self.density is not None:
            return self.density
        if type(self).groups is Structure.groups or not mask.numel():
            return float(mask.double().mean())
        groups = self.groups(mask.shape[0], mask[0].numel()).flatten().to(mask.device)
        return float((groups.bincount(mask.flatten().double()) / groups.bincount()).mean())

    def at(self, density: float) -> Structure | None:
        """The structure of its kind that keeps at least this density, for masks that thin out while training; None where that is all weights."""
        return self if density < 1 else None

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        """Storage formats, with their attributes, that suit a mask of this structure."""
        raise NotImplementedError

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a weight [rows, columns] cannot have this structure; None when it can."""
        return None

    def check(self, shape: tuple[int, ...], density: float) -> None:
        """Raise StructureError unless a weight of this shape can be cut to this density."""
        if not 0 < density <= 1:
            raise StructureError(f"a density lies above 0 and at most at 1, got {density}", where=str(self))
        if self.density is not None and abs(density - self.density) > SLACK:
            raise StructureError(f"{self} keeps {self.density:.4g} of the weights, not {density:.4g}", where=str(self),
                                 hint=f"ask for density {self.density:.4g} with a uniform budget, or take another structure")
        if len(shape) < 2:
            raise StructureError(f"needs a weight of two dimensions or more, got {list(shape)}", where=str(self))
        reason = self.misfit(shape[0], math.prod(shape[1:]))
        if reason is not None:
            raise StructureError(reason, where=str(self), hint=self.hint)

    def mask(self, score: Tensor, density: float) -> Tensor:
        """bool, the shape of `score` [out, in, ...]: True for what is kept, which is what scores highest.

        Of a group of c elements (the layer, a row, ...) exactly ceil(density * c) are kept. Among equal scores the ones that come first go
        first, as in Wanda's own code. Raises StructureError for NaN scores and whatever `check` refuses.
        """
        self.check(tuple(score.shape), density)
        if score.numel() == 0:
            return torch.ones_like(score, dtype=torch.bool)
        flat = score.detach().reshape(score.shape[0], -1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        if bool(flat.isnan().any()):
            raise StructureError("the score holds NaN", where=str(self), hint="the weights or the calibration statistics are not finite")
        return self._keep(flat, density).reshape(score.shape)

    def _keep(self, score: Tensor, density: float) -> Tensor:
        """The mask of a float [rows, columns] score that fits and is not empty."""
        raise NotImplementedError

    @staticmethod
    def parse(text: str) -> Structure:
        """The structure of a shorthand: "unstructured", "row", "column", "fan_in", "2:4", "16x1", or in full "NM(n=2, m=4)". Raises ParseError."""
        plain = text.strip().lower().replace("-", "_").replace(" ", "")
        pair = re.fullmatch(r"(\d+)([:x×])(\d+)", plain)
        if pair:
            first, second = int(pair[1]), int(pair[3])
            return _make("nm", n=first, m=second) if pair[2] == ":" else _make("block", rows=first, columns=second)
        if plain in ("unstructured", "row", "column"):
            return _make("unstructured", scope="layer" if plain == "unstructured" else plain)
        if plain == "fan_in":
            return _make("fan_in")
        return _parse_in_full(text)


# Formats that hold any mask: bits are smaller above a density of about 1/16, columns below it.
ANY_MASK: tuple[tuple[str, Mapping[str, int]], ...] = (("bitmap", {}), ("csr", {}))


def _make(name: str, **options: int | str) -> Structure:
    made: Structure = catalog.get("structure", name)(**options)
    return made


def _parse_in_full(text: str) -> Structure:
    from sparsify_compiler.pipeline_text import parse_value

    try:
        value = parse_value(text)
    except StructureError:
        raise
    except SparsifyError:
        value = None
    if isinstance(value, Structure):
        return value
    raise ParseError(f"not a structure: {text!r}", where="structure",
                     hint='write "unstructured", "row", "column", "fan_in", "2:4", "16x1", or in full NM(n=2, m=4)')


def kept(total: int, density: float) -> int:
    """How many of `total` elements a density keeps: ceil(density * total)."""
    return min(total, math.ceil(density * total - SLACK))


def keep_groups(score: Tensor, size: int, density: float) -> Tensor:
    """bool, the length of the vector `score`: the ceil(density * runs) runs of `size` neighbours of highest mean; the last run may be shorter."""
    means = torch.stack([run.mean() for run in torch.split(score, size)])
    return keep_top(means[None], kept(len(means), density))[0].repeat_interleave(size)[: len(score)]


def keep_top(score: Tensor, count: int) -> Tensor:
    """bool mask of the `count` highest of each row of `score` [groups, size]; of equal ones, the last are kept."""
    size = score.shape[1]
    cut = size - count
    if cut <= 0 or count <= 0:
        return torch.full(score.shape, cut <= 0, dtype=torch.bool, device=score.device)
    limit = score.kthvalue(cut, dim=1, keepdim=True).values
    below, equal = score < limit, score == limit
    missing = cut - below.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > missing).any()):
        equal &= equal.cumsum(1) <= missing
    return ~(below | equal)
