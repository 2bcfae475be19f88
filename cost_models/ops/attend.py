"""attend: attend_blocks over the pairs of blocks that its indexer finds."""

from __future__ import annotations

from sparsify_compiler.cost_models.ops import attend_blocks

FLOPS = attend_blocks.FLOPS
BYTES = attend_blocks.BYTES
