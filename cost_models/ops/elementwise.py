"""One pass over tensors: norms with stored statistics, sums, scales, pools, copies. `taps` operations for each element written."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import read, taps, written, x_bytes

FLOPS = taps * written
BYTES = x_bytes * (read + written)
