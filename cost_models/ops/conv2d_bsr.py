"""conv2d_bsr: M places of the output, N outputs, K inputs of a group, `taps` places of the kernel."""

from __future__ import annotations

from sparsify_compiler.cost_models.ops import linear_bsr
from sparsify_compiler.cost_models.ops._conv2d import of_patches

FLOPS, BYTES = of_patches(linear_bsr.FLOPS, linear_bsr.BYTES)
