"""select_ffn on a CPU: one row of x selects its neurons; the meaning is sparsify_compiler/ops/select_ffn.py, the family gather_ffn.py."""

from __future__ import annotations

from sparsify_compiler.codegen.kernels.gather_ffn import offer as offer
