"""conv2d_csr: M places of the output, N outputs, K inputs of a group, `taps` places of the kernel."""

from __future__ import annotations

from sparsify_compiler.cost_models.ops import linear_csr
from sparsify_compiler.cost_models.ops._conv2d import of_patches

FLOPS, BYTES = of_patches(linear_csr.FLOPS, linear_csr.BYTES)
