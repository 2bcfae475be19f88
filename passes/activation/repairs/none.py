"""None: what is skipped is left out."""

from __future__ import annotations

from sparsify_compiler.passes.activation.repairs._base import Repaired, Skipping


def none(skipping: Skipping, density: float) -> Repaired:
    """Everything goes into the selection."""
    return Repaired(density)
