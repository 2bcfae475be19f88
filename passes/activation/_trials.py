"""Blocks that are run to see what a selection inside of them does to their output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune._layers import Use
from sparsify_compiler.program import Program
from sparsify_compiler.site_block import find_blocks
from sparsify_compiler.sweep import Sweep

BATCHES = 1  # that a trial runs


class BlockTrials:
    """The blocks of a Program, and the batches that go through them. What they are given is what the dense model gives."""

    def __init__(self, program: Program, batches: Sequence[Any] | None) -> None:
        self._program, self._batches = program, batches
        self._blocks = {(block.region, op): block for block in find_blocks(program) for op in block.ops}
        self._sweep: Sweep | None = None
        self._output: fx.Node | None = None
        self._dense: list[Tensor] = []

    def name(self, use: Use) -> str | None:
        """The path of the block that an op lies in."""
        block = self._blocks.get((use.region.path, use.op.name))
        return None if block is None else block.path

    def error(self, use: Use, reads: Mapping[fx.Node, Callable[[Tensor], Tensor]]) -> float:
        """||change of the output|| of the block of an op, when ops inside of it read what these functions make of their inputs.

        Where the op lies in no block, of the last of those ops. Blocks must be asked about in the order of execution. Raises CalibrationError where
        they cannot be run.
        """
        self._sweep = self._sweep or self._begin()
        block = self._blocks.get((use.region.path, use.op.name))
        output = max(reads, key=self._sweep.order) if block is None else use.region.node(block.output)
        if output is not self._output:
            if block is not None:
                self._sweep.reach(use.region.node(block.input))
            self._output, self._dense = output, self._sweep.ahead(output, {})
        found = self._sweep.ahead(output, reads)
        return math.sqrt(sum(float((one - other).float().square().sum()) for one, other in zip(found, self._dense, strict=True)))

    def _begin(self) -> Sweep:
        if self._program.skeleton is not None:
            raise CalibrationError("whole blocks are run to see their errors, and this model was captured in parts", where="budget block_greedy",
                                   hint="add use_cache=False to the example inputs and the batches of a language model; or say budget='greedy'")
        if not self._batches:
            raise CalibrationError("whole blocks are run on calibration batches, and there are none", where="budget block_greedy",
                                   hint="give calibration=batches")
        return Sweep(self._program, self._batches[:BATCHES])
