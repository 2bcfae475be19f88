"""What finding the blocks costs: every scorer with its selector beside dense attention and beside attention over the blocks that it found.

    python benchmarks/attention_indexers.py [--tokens 2048 8192] [--queries 1] [--heads 9] [--groups 3] [--width 64]

Float32, one batch entry, blocks of 64 × 64, an eighth of the blocks; queries and keys are random but smooth along the text, so that blocks differ.
A scorer may look at tokens in an order ("pooled in by_importance"), whose cost is the indexer's, and that of moving tokens the attention's. What is
learned is random. Prompts by default; --queries 1 is a step of decoding, whose sums of keys are kept as the cache keeps them.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsify_compiler.indexer import Indexer
from sparsify_compiler.key_sums import KeySums
from sparsify_compiler.measure import interleave
from sparsify_compiler.ops import attend

SCORERS = ("pooled", "gaussian", "page_bounds", "vertical_slash", "antidiagonal", "sampled_rows", "channels", "proxy_heads", "gate", "mean_windows",
           "pooled in by_importance", "shared_clusters in by_cluster")


def smooth(tokens: int, heads: int, width: int, generator: torch.Generator) -> Tensor:
    """[1, heads, tokens, width], as projections leave it: the heads of a token beside each other."""
    steps = torch.randn(1, tokens, heads, width, generator=generator, dtype=torch.float32)
    return (steps + 4 * steps[:, :: 64].repeat_interleave(64, 1)[:, :tokens]).transpose(1, 2) / 2


def learned(heads: int, groups: int, width: int) -> dict[str, Tensor]:
    """Tensors of the shapes that indexers learn."""
    sizes = {"gate_query": (heads, width, width), "gate_key": (groups, 3 * width, width), "centroids": (groups, 16, width)}
    return {name: torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float32) for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--queries", type=int)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--scorers", nargs="+", default=SCORERS)
    parser.add_argument("--seconds", type=float, default=1.5)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    table = Table(title=f"{arguments.heads} heads, {arguments.groups} groups, width {arguments.width}, {torch.get_num_threads()} threads, ms")
    for column in ("tokens", "scorer", "density", "dense", "indexer", "attention", "gain"):
        table.add_column(column, justify="left" if column == "scorer" else "right")
    for tokens in arguments.tokens:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (smooth(tokens, heads, arguments.width, generator) for heads in (arguments.heads, arguments.groups, arguments.groups))
        query = query[:, :, -arguments.queries:] if arguments.queries else query
        key, scale = KeySums().give(key), arguments.width**-0.5
        for scorer in arguments.scorers:
            selector = f"top_k(share=0.0, blocks={max(tokens // 64 // 8, 1)})"
            name, _, order = scorer.partition(" in ")
            indexer = Indexer.parse(f"Indexer(scorer='{name}', selector='{selector}', order='{order}')")
            find = partial(indexer.layout, query, key, True, scale, None, learned(arguments.heads, arguments.groups, arguments.width))
            layout = find()
            times = interleave({"dense": partial(attend.dense, query, key, value, is_causal=True),
                                "indexer": find,
                                "attention": partial(layout.attend, query, key, value)}, at_most=arguments.seconds, repeats=1)
            dense, found, attention = (times[name].median for name in ("dense", "indexer", "attention"))
            table.add_row(str(tokens), scorer, f"{layout.density():.3f}", f"{dense:.3g}", f"{found:.3g}", f"{attention:.3g}",
                          f"{dense / (found + attention):.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
