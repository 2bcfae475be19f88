"""What SpargeAttn's second stage would skip behind its first: pairs of blocks in which every score of some rows lies far below their largest so far.

    python benchmarks/attention_skips.py --brown FOLDER [--masses 0.9 0.95] [--every 6]

SmolLM2 on a Brown text of 2048 tokens, one of so many layers; blocks of 64 keys in order; of the pairs that recipes.sparge_attn(mass) reads the share
whose values a kernel need not add, for all 64 rows of a block of queries or for 16 of them. A key's weight is then below exp(limit) of the largest.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

import torch
from attention_quality import Subject
from rich.console import Console
from rich.table import Table
from subjects import options
from torch import Tensor

from sparsify_compiler.attention_taps import with_taps
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline

BLOCK, ROWS = 64, (64, 16)
LIMITS = (-2.0, -4.0, -6.0, -8.0)  # the paper's lambda


class Counted:
    """Attention that stays dense, and counts."""

    def __init__(self, indexers: Mapping[float, Mapping[str, Indexer]], every: int) -> None:
        self._indexers, self._every, self._calls = indexers, every, 0
        self.pairs, self.skipped = Counter[float](), Counter[tuple[float, float, int]]()

    def attention(self, path: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        given, factor = (query.float(), key.float(), value.float()), query.shape[-1] ** -0.5 if scale is None else scale
        if self._calls % self._every == 0:
            self._count(path, given[0], given[1], factor)
        self._calls += 1
        return attend.dense(*given, is_causal=True, scale=scale).to(query.dtype)

    def _count(self, path: str, query: Tensor, key: Tensor, factor: float) -> None:
        tokens = query.shape[2]
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * factor
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf)
        largest = scores.unflatten(-1, (-1, BLOCK)).amax(-1)  # [1, heads, tokens, blocks of keys]
        for mass, now in self._indexers.items():
            read = now[path].layout(query, key, True, factor, None, {}).mask().unflatten(-1, (-1, BLOCK)).any(-1)
            pairs = read.unflatten(2, (-1, BLOCK)).any(3)
            read = pairs.repeat_interleave(BLOCK, 2).expand_as(largest)
            so_far = largest.masked_fill(~read, -torch.inf).cummax(-1).values
            before = torch.cat((torch.full_like(so_far[..., :1], -torch.inf), so_far[..., :-1]), -1)
            below = (largest - before).masked_fill(~read, torch.inf)
            self.pairs[mass] += int(pairs.sum())
            for limit in LIMITS:
                for rows in ROWS:
                    self.skipped[mass, limit, rows] += int((below.unflatten(2, (-1, rows)).amax(3) < limit).sum()) * rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--masses", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--every", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = Subject(argparse.Namespace(**vars(arguments), texts=1, needles=0, dtype="bfloat16"))
    ctx = Context(batches=subject.batches)
    indexers = {mass: {path: Indexer.parse(text) for path, text in
                       Pipeline.parse(f"sparge_attn(mass={mass}, block={BLOCK})").run(subject.captured, ctx).attentions.items()}
                for mass in arguments.masses}
    counted = Counted(indexers, arguments.every)
    subject.model = with_taps(subject.captured, subject.sites, counted.attention)
    subject.losses(subject.texts["Brown"][0])
    table = Table(title="share of the pairs of blocks that are read whose values could be skipped")
    for column in ("mass", "pairs", "limit", *[f"{rows} rows at once" for rows in ROWS]):
        table.add_column(column, justify="right")
    for mass, pairs in counted.pairs.items():
        for limit in LIMITS:
            shares = [f"{counted.skipped[mass, limit, rows] / BLOCK / max(pairs, 1):.2%}" for rows in ROWS]
            table.add_row(f"{mass:g}", str(pairs), f"{limit:g}", *shares)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
