"""None: the weights that are kept stay as they are."""

from __future__ import annotations

from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired

STATISTICS: tuple[str, ...] = ()
CHOOSES = False


def none(cut: Cut) -> Repaired:
    """The cut weight, not mended."""
    mask = cut.given_mask()
    return Repaired(cut.weight * mask, mask)
