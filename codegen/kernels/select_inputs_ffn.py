"""select_inputs_ffn on a CPU: few rows of x in one call; the meaning is ops/select_inputs_ffn.py, the family gather_inputs_ffn.py."""

from __future__ import annotations

from sparsify_compiler.codegen.kernels.gather_inputs_ffn import offer as offer
