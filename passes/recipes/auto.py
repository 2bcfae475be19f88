"""What may always be done."""

from __future__ import annotations

from sparsify_compiler.passes.recipes.reparam import reparam
from sparsify_compiler.pipeline import Pipeline


def auto() -> Pipeline:
    """Everything that is exact and pays; nothing that trades quality is chosen yet.

    Paper      none: composes passes that cite theirs
    """
    return reparam()
