"""What may always be done, and a plan for the rest."""

from __future__ import annotations

from sparsify_compiler.passes.plan.choose_layers import ChooseLayers
from sparsify_compiler.passes.recipes.reparam import reparam
from sparsify_compiler.pipeline import Pipeline


def auto(ignore: tuple[str, ...] = ()) -> Pipeline:
    """Everything that is exact and pays; then, where there is a budget, what each layer is cut to and how far, so that the model loses least.

    Paper      none: composes passes that cite theirs
    """
    return reparam() | ChooseLayers(ignore=ignore)
