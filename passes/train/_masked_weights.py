"""Weights that have a mask, for passes that act on the weights and leave the mask to others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sparsify_compiler.errors import InputError
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._places import mask_of, structure_of
from sparsify_compiler.passes.train.move_masks import masked_sites
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program
from sparsify_compiler.training import Marked

if TYPE_CHECKING:
    from sparsify_compiler.training import TrainingPass


@dataclass(frozen=True)
class Aimed:
    """A parameter, its mask, and what that is to be in the end: of which structure, and the share of the weights that it keeps."""

    path: str
    parameter: nn.Parameter
    mask: Tensor
    structure: Structure
    density: float
    share: float  # of the groups, of which the last may be smaller


def mark_masked(of: TrainingPass, program: Program, ctx: Context, targets: tuple[str, ...], ignore: tuple[str, ...]) -> Program:
    """Mark the product of each chosen site's weight and mask."""
    for _, site, found in masked_sites(program, ctx, targets, ignore):
        of.mark(found.product, site, ctx)
    return program


def aimed(marked: Sequence[Marked]) -> list[Aimed]:
    """One for each weight. Raises InputError for a packed weight, which has lost what the mask did not keep."""
    found: dict[int, Aimed] = {}
    for one in marked:
        parameter = next((tensor for tensor in one.tensors.values() if isinstance(tensor, nn.Parameter)), None)
        if parameter is None:
            raise InputError("a packed weight holds nothing but what is kept", where=one.path, hint="leave out pack()")
        mask, decision = mask_of(one), one.decision
        made = decision is not None and decision.structure not in ("dense", "unknown")  # then its density is that of the mask before anybody moved it
        density = decision.density if decision is not None and made else float(mask.double().mean())
        found[id(parameter)] = Aimed(one.path, parameter, mask, structure_of(one, None), density,
                                     min(density, decision.budget) if decision is not None and made else density)
    return list(found.values())
