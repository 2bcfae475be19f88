"""The families of kernels for GPUs, most promising first; codegen/runtime.py offers them for weights that lie there."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from sparsify_compiler.codegen.cuda import experts, ffn, gather, linear

FAMILIES: Mapping[str, ModuleType] = {family.NAME: family for family in (linear, gather, ffn, experts)}
