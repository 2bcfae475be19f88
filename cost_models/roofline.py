"""Seconds from operations and bytes: the slower of computing and moving, and what a call costs by itself."""

from __future__ import annotations

from sympy import Expr, Max

from sparsify_compiler.cost_models.symbols import bandwidth, launch, peak


def seconds(flops: Expr, moved: Expr) -> Expr:
    """launch + max(flops / peak, bytes / bandwidth) (Williams et al., Roofline, CACM 2009)."""
    return launch + Max(flops / peak, moved / bandwidth)
