"""Speed of attention over some blocks of keys, against torch's scaled_dot_product_attention and compiled FlexAttention, interleaved.

    python benchmarks/attention.py [--tokens 1024 ...] [--heads 8 ...] [--widths 64 ...] [--dtypes fp32 bf16] [--flex window tenth] [--rounds 1]
                                   [--build]
    python benchmarks/attention.py --decode [--tokens 8192 32768] [--heads 8 32] [--groups 8]

Causal prefill: all blocks, a window of 512 tokens and 64 sinks, and a random tenth of the blocks below the diagonal (one choice for all heads; blocks
of 64 × 64). "of ideal" is SDPA's time times the share of its causal blocks that are read, over the time taken. Decoding: one query row, an eighth
of the blocks of the cache, each group its own; the gain is over the fastest of torch's dense forms: SDPA as models call it, SDPA with the heads of a
group as rows of one head (ops/attend.py's), and two matrix products for the same rows. Layouts are made beforehand. --flex alone times FlexAttention
for none of the patterns. --build compiles what is to be timed and leaves; what is slow is then timed in a few --rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import BlockLayout, from_blocks
from sparsify_compiler.block_pattern import union
from sparsify_compiler.measure import interleave
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATTERNS = ("all", "window", "tenth")
BLOCK, WINDOW, SINKS, SHARE, KEPT = 64, 512, 64, 0.1, 8
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--heads", nargs="+", type=int, default=[8])
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--flex", nargs="*", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--build", action="store_true")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    columns = ("rows ms", "matmul ms", "kept ms", "GB/s", "gain", "all ms") if given.decode else (
        "TFLOP/s", "all ms (of ideal)", "window ms (of ideal)", "tenth ms (of ideal)", "FlexAttention: all", "window", "tenth")
    table = Table(title=f"{torch.get_num_threads()} threads")
    for column in ("tokens", "heads", "width", "dtype", "SDPA ms", *columns):
        table.add_column(column, justify="right")
    for tokens in given.tokens or ([8192, 32768] if given.decode else [1024, 2048, 4096, 8192, 16384]):
        for heads in given.heads:
            for width in given.widths:
                for name in given.dtypes:
                    torch.manual_seed(0)
                    row = decode(tokens, heads, min(given.groups, heads), width, DTYPES[name], given.build) if given.decode else prefill(
                        tokens, heads, width, DTYPES[name], given.flex, 0 if given.build else given.rounds)
                    found = (str(tokens), str(heads), str(width), name, *row)
                    table.add_row(*found)
                    Console(stderr=True, width=150).print(*found)
    if not given.build:
        Console(width=150).print(table)


def prefill(tokens: int, heads: int, width: int, dtype: torch.dtype, flex: list[str], rounds: int) -> Iterator[str]:
    """What the table says of one size; nothing without rounds."""
    torch._dynamo.reset()   # it compiles a function 8 times, then no more
    query, key, value = (torch.randn(1, heads, tokens, width).to(dtype) for _ in range(3))
    layouts = dict(patterns(tokens))
    forms: dict[str, Callable[[], object]] = {"SDPA": lambda: scaled_dot_product_attention(query, key, value, is_causal=True)}
    for name, (layout, mask) in layouts.items():
        forms[name] = lambda layout=layout: layout.attend(query, key, value)
        if name in flex:
            forms[f"flex {name}"] = flexible(query, key, value, mask)
    for form in forms.values():
        form()
    if not rounds:
        return iter(())
    found = {name: timing.median for name, timing in interleave(forms, rounds=rounds, warmup=0, at_most=12.0, repeats=1).items()}
    flops = 2 * heads * tokens * tokens * width
    cells = [f"{found['SDPA']:.2f}", f"{flops / found['SDPA'] / 1e9:.2f}"]
    for name, (layout, _) in layouts.items():
        cells.append(f"{found[name]:.2f} ({100 * layout.density() * found['SDPA'] / found[name]:.0f} %)")
    cells.extend(f"{found[f'flex {name}'] / found[name]:.1f} x" if name in flex else "" for name in layouts)
    return iter(cells)


def patterns(tokens: int) -> Iterator[tuple[str, tuple[BlockLayout, Mask]]]:
    """Layouts of blocks, and the same as masks for FlexAttention."""
    grid = Grid(tokens, tokens, BLOCK, BLOCK, True)
    below = grid.visible()
    yield "all", (from_blocks(below[None, None], grid), lambda b, h, q, k: q >= k)
    window = union((SlidingWindow(window=WINDOW), Sinks(tokens=SINKS)), grid).layout()
    yield "window", (window, lambda b, h, q, k: (q >= k) & ((q - k < WINDOW) | (k < SINKS)))
    chosen = (torch.rand(grid.rows, grid.columns) < SHARE) & below | torch.eye(grid.rows, dtype=torch.bool)
    yield "tenth", (from_blocks(chosen[None, None], grid), lambda b, h, q, k: (q >= k) & chosen[q // BLOCK, k // BLOCK])


def flexible(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Callable[[], object]:
    """FlexAttention, compiled for this size."""
    tokens = query.shape[2]
    blocks = create_block_mask(mask, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=blocks)


def decode(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype, build: bool) -> Iterator[str]:
    """What the table says of one size of cache."""
    query = torch.randn(1, heads, 1, width).to(dtype)
    key, value = (torch.randn(1, groups, tokens, width).to(dtype) for _ in range(2))
    blocks = -(-tokens // BLOCK)
    chosen = torch.rand(1, groups, 1, blocks).argsort(-1) < blocks // KEPT
    kept, every = (from_blocks(table, Grid(1, tokens, BLOCK, BLOCK, True)) for table in (chosen, torch.ones_like(chosen)))
    forms: dict[str, Callable[[], object]] = {
        "SDPA": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=heads != groups),
        "rows": lambda: attend.dense(query, key, value, is_causal=True), "matmul": lambda: products(query, key, value),
        "kept": lambda: kept.attend(query, key, value), "all": lambda: every.attend(query, key, value)}
    if build:
        for form in forms.values():
            form()
        return iter(())
    found = {name: timing.median for name, timing in interleave(forms, rounds=31, warmup=2, at_most=4.0).items()}
    best = min(found[name] for name in ("SDPA", "rows", "matmul"))
    moved = 2 * groups * tokens * width * dtype.itemsize / KEPT
    return iter((*(f"{found[name]:.2f}" for name in ("SDPA", "rows", "matmul")), f"{found['kept']:.3f}", f"{moved / found['kept'] / 1e6:.0f}",
                 f"{best / found['kept']:.1f} x", f"{found['all']:.2f}"))


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention of one row of each head as two products for each group."""
    rows = (query * query.shape[-1]**-0.5).reshape(key.shape[1], -1, query.shape[-1])
    return torch.bmm(torch.bmm(rows, key[0].mT).softmax(-1), value[0])


if __name__ == "__main__":
    main()
