"""conv2d, and likewise conv1d and conv3d: M places of the output, N outputs, K inputs of a group, `taps` places of the kernel."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, read, taps, value_bytes, written, x_bytes

FLOPS = 2 * M * N * K * taps
BYTES = value_bytes * N * K * taps + x_bytes * (read + written)
