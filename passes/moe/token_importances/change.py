"""Change: by how much of its length a token changes in the block. Own."""

from __future__ import annotations

from sparsify_compiler.passes.moe._depth import Depth, token_change
from sparsify_compiler.passes.moe.token_importances._base import Asked
from sparsify_compiler.program import Region


def change(region: Region, block: Depth) -> Asked:
    """||y - x|| / ||x|| of each token."""
    return token_change, {"x": region.node(block.part.start.name), "y": region.node(block.part.end.name)}
