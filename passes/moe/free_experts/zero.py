"""Zero: gives 0, so that an easy row runs through fewer experts (MoE++, arXiv:2410.07348)."""

from __future__ import annotations

from sparsify_compiler.passes.moe._evidence import Evidence


def zero(evidence: Evidence) -> None:
    """Nothing to compute."""
    return
