"""What a weight on slices of 16 outputs takes (codegen/kernels/slice_layout.py), and what a call of its kernel computes.

steps is the number of vectors of 16 weights, padding included. Where n of every m inputs are kept it follows from the sizes: PLACES_STEPS.
"""

from __future__ import annotations

from sympy import Expr, Integer, Piecewise, ceiling

from sparsify_compiler.cost_models.symbols import K, M, N, block, m, n, pointer_bytes, steps, value_bytes

LANES = Integer(16)
SHARES = 64

SLICES: Expr = ceiling(N / LANES)
PLACES_STEPS: Expr = SLICES * ceiling(K / m * n / block) * block
FLOPS: Expr = 2 * M * LANES * steps

_BESIDE: Expr = pointer_bytes * (SLICES + 1 + SHARES + 1) + (pointer_bytes + 4) * LANES * SLICES  # pointers and shares; order and float32 bias
GAPS_BYTES: Expr = LANES * steps * (value_bytes + 1) + _BESIDE
COLUMNS_BYTES: Expr = GAPS_BYTES + LANES * steps
PLACES_BYTES: Expr = LANES * steps * (value_bytes + Piecewise((Integer(2), m <= 4), (Integer(4), True)) / 8) + _BESIDE
