"""open_texts: M marks read, the places of those that are open written."""

from __future__ import annotations

from sympy import Integer

from sparsify_compiler.cost_models.symbols import M, density, x_bytes

FLOPS = Integer(0)
BYTES = M * (x_bytes + 8 * density)
