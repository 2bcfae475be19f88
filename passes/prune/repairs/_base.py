"""What a repair is given and what it gives back.

A repair is a function `name(cut: Cut, *, options...) -> Repaired` in a file of its own, with two module constants:

    STATISTICS   what must be known of the layer's input: names of sweep_gather.OWN
    CHOOSES      True where it can choose the mask itself: mask_weights(score="repair")

It changes nothing that it is given. The layer computes x W^T + bias from rows x of K inputs; a convolution's rows are its patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.structures._base import Structure, kept
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.passes.prune.structures.fan_in import FanIn
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes.prune.structures.vnm import VNM

MORE = 10.0  # a matrix that Cholesky refuses is damped this many times more, until it does not
TRIES = 12


@dataclass(frozen=True)
class Cut:
    """A layer about to lose weights.

    weight      float32 (float64 of a float64 model) [out, K], finite
    mask        bool [out, K], True for what is kept; None where the repair is to choose it
    structure   what `mask` keeps to, and what a repair that moves it must keep to
    density     the layer's budget
    statistics  by name. "cross" and "residual" are there when the layer is to match the dense model's output rather than its own on the same input
    """

    weight: Tensor
    mask: Tensor | None
    structure: Structure
    density: float
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def given_mask(self) -> Tensor:
        """The mask, for a repair that does not choose one."""
        if self.mask is None:
            raise CalibrationError("this repair does not choose what to keep", where="repair", hint="name a score")
        return self.mask

    def target(self) -> Tensor:
        """[out, K]: Y^T X, where Y is what the layer's output (without its bias) should be and X its rows."""
        wanted = self.weight @ self.statistics.get("cross", self.statistics["patch_gram"]).to(self.weight)
        residual = self.statistics.get("residual")
        return wanted if residual is None or not residual.shape[0] else wanted + residual.to(self.weight)


@dataclass(frozen=True)
class Repaired:
    """weight [out, K], zero where mask [out, K] is False; bias [out], to be added to the layer's own; note: what the report should tell.

    low_rank  (reads [r, K], writes [out, r]): the layer computes x (weight + writes @ reads)^T, the second part as two dense layers
    """

    weight: Tensor
    mask: Tensor
    bias: Tensor | None = None
    note: str = ""
    low_rank: tuple[Tensor, Tensor] | None = None


def windows(structure: Structure, columns: int, width: int, density: float) -> list[tuple[int, int, float]]:
    """(first column, end, density) of the columns that are chosen at one time when a mask is chosen from left to right.

    A group of n:m at a time, so that the later ones know what became of those before; else about `width` columns, never across a block; a
    structure that cannot be chosen piece by piece (whole rows) all at once. Every row of a constant fan-in keeps exactly its number.
    """
    if isinstance(structure, VNM) or (isinstance(structure, NM) and structure.along == "inputs"):
        step = structure.m
    elif isinstance(structure, Unstructured | FanIn | Block | NM):
        period = structure.columns if isinstance(structure, Block) else 1
        step = max(period, width // period * period)
    else:
        step = columns
    per_row = isinstance(structure, FanIn) or (isinstance(structure, Unstructured) and structure.scope == "row")
    found, taken = [], 0
    for start in range(0, columns, step):
        end = min(start + step, columns)
        until = kept(columns, density) if end == columns else round(density * end)
        found.append((start, end, (until - taken) / (end - start) if per_row else density))
        taken = until
    return found


def damped(gram: Tensor, share: float, dtype: torch.dtype, power: float = 0.0) -> tuple[Tensor, Tensor, str]:
    """(gram + share * m^(1 - power) * diagonal^power, m the mean of the diagonal; its lower Cholesky factor; what had to be done beyond that).

    Power 0 damps all inputs alike, 1 each by its own scale. Inputs that are always zero get a diagonal of m.
    Where Cholesky fails, the share grows until it does not.
    Raises CalibrationError for a Gram matrix that is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise CalibrationError("the Gram matrix of this layer's input is not finite", where="repair", hint="check the calibration batches")
    base = gram.to(dtype)
    diagonal = base.diagonal()
    mean = float(diagonal.mean())
    dead = diagonal <= 0
    notes = [f"{int(dead.sum())} of {len(dead)} inputs are always zero"] if bool(dead.any()) else []
    if mean <= 0:
        eye = torch.eye(len(dead), dtype=dtype, device=base.device)
        return eye, eye.clone(), "the input is always zero"
    for attempt in range(TRIES):
        matrix = base.clone()
        extra = max(share, 1e-8) * MORE**attempt if attempt else share
        matrix.diagonal().add_(extra * mean * (diagonal / mean).clamp(min=0) ** power)
        matrix.diagonal()[dead] += mean
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed) and bool(factor.isfinite().all()):
            if attempt:
                notes.append(f"the Gram matrix is singular: damped by {extra:.0e} of its mean diagonal")
            return matrix, factor, "; ".join(notes)
    raise CalibrationError("the Gram matrix of this layer's input cannot be inverted", where="repair", hint="give more calibration batches")
