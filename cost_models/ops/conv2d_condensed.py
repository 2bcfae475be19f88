"""conv2d_condensed: M places of the output, N outputs, K inputs of a group, `taps` places of the kernel."""

from __future__ import annotations

from sparsify_compiler.cost_models.ops import linear_condensed
from sparsify_compiler.cost_models.ops._conv2d import of_patches

FLOPS, BYTES = of_patches(linear_condensed.FLOPS, linear_condensed.BYTES)
