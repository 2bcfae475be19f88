"""Attention by blocks that scores choose, in graphs without torch: what the kernel that chooses is given (codegen/kernels/score_blocks.py).

Scorers and selectors say in their files what a kernel needs of them, for a step of decoding (page_choice.py): pages, how they are scored, the share
of the blocks, and as many at least. The same numbers serve every block of queries of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .block_grid import Grid
from .block_layout import BlockTable, stack
from .block_tables import named, static_table
from .errors import ModelError
from .indexer import Indexer
from .ops.top_pages import Pages
from .page_choice import numbers_of

HINT = ("whole graphs choose by scorer=pooled (without similarity), gaussian or page_bounds and selector=top_k, or read by patterns alone; "
        "save() keeps it for PyTorch")


class Scores(NamedTuple):
    """How blocks are chosen: of each head the share of them and as many at least (-1: by the pattern alone); logs of 0, 1, ... places of two blocks.

    text   of the indexer, which is what all of this means
    """

    pages: Pages
    shares: Tensor
    least: Tensor
    logs: Tensor
    text: str


def scores_of(indexer: Indexer, heads: int, node: fx.Node) -> Scores:
    """Raises ModelError for a choice that no kernel of whole graphs makes."""
    numbers, found = numbers_of(indexer, heads), None
    if numbers:
        scorer = named("block scorer", next(part.scorer for part, _ in indexer.parts(heads) if part.scorer))
        grid = Grid(indexer.block_q, indexer.block_k, indexer.block_q, indexer.block_k, False)
        found = scorer.module.pages(grid, **scorer.options) if hasattr(scorer.module, "pages") else None
    if found is None:
        raise ModelError("this attention chooses the blocks that it reads by scores, in a way that whole graphs do not", where=node.name, hint=HINT)
    shares = torch.tensor([share for share, _ in numbers], dtype=torch.float32)
    least = torch.tensor([number for _, number in numbers], dtype=torch.int32)
    logs = torch.arange(indexer.block_q * indexer.block_k + 1, dtype=torch.float32).log()
    return Scores(found[0], shares, least, logs, str(indexer))


def patterns_of(indexer: Indexer, heads: int, grid: Grid, before: int = 0) -> BlockTable:
    """What each head reads whatever the scores are, kinds [1, 1 or heads, NQ, NK], of a text that begins so many places behind the grid's first."""
    parts = indexer.parts(heads)
    tables = [static_table(part.always, grid, (before,)) for part, _ in parts]
    if len(parts) == 1:
        return tables[0]
    whole = stack([table.expand(1, len(mine)) for table, (_, mine) in zip(tables, parts, strict=True)], 1)
    return replace(whole.take_heads(torch.tensor([head for _, mine in parts for head in mine]).argsort()), grid=grid)


def places_before(indexer: Indexer, heads: int) -> int:
    """Places ahead of a text that blocks which its first token is in may have, as whole blocks; 0 where nothing is read whatever the scores are."""
    return math.lcm(indexer.block_q, indexer.block_k) if any(part.always for part, _ in indexer.parts(heads)) else 0
