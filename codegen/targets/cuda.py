"""Target -> TVM's options for CUDA: the architecture decides everything."""

from __future__ import annotations

from typing import Any

from sparsify_compiler.target import Target


def options(target: Target) -> dict[str, Any]:
    """TVM's options for this target."""
    return {"kind": "cuda", "arch": target.mcpu}
