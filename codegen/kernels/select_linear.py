"""select_linear on a CPU: rows of x select their inputs; the meaning is sparsify_compiler/ops/select_linear.py, the family gather.py."""

from __future__ import annotations

from sparsify_compiler.codegen.kernels.gather import offer as offer
