"""predicted_ffn on a CPU: one row of x reads its chosen neurons; the meaning is sparsify_compiler/ops/predicted_ffn.py, the family
gather_predicted_ffn.py.
"""

from __future__ import annotations

from sparsify_compiler.codegen.kernels.gather_predicted_ffn import offer as offer
