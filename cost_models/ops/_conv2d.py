"""What a sparse convolution costs, by the linear layer over the patches of x that it is."""

from __future__ import annotations

from sympy import Expr

from sparsify_compiler.cost_models.symbols import K, activations, read, taps, written, x_bytes


def of_patches(flops: Expr, moved: Expr) -> tuple[Expr, Expr]:
    """FLOPS and BYTES from those of the linear op: K * taps inputs each; x is read and y written once, whatever the patches share."""
    return flops.subs(K, K * taps), (moved - activations).subs(K, K * taps) + x_bytes * (read + written)
