"""Copy: gives what it reads (MoE++, arXiv:2410.07348)."""

from __future__ import annotations

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe._evidence import Evidence, Formula


def copy(evidence: Evidence) -> Formula:
    """x. Raises ParseError for an FFN that gives another width than it reads."""
    outputs, inputs = evidence.ffn.down.shape[0], evidence.ffn.gate.shape[1]
    if outputs != inputs:
        raise ParseError(f"a copy of {inputs} inputs is no output of {outputs}", where=evidence.where, hint="free=('zero',)")
    return Formula({}, lambda x: x)
