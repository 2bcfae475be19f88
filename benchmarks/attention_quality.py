"""Quality of sparse attention on real language: perplexity and retrieval of SmolLM2 at 2048 tokens, its trained length, beside the density of blocks.

    python benchmarks/attention_quality.py --brown FOLDER [--json FILE] [--plot FILE] [--methods quest ...] [--levels 0 1] [--split choose]

Model, texts and splits are those of subjects.py: what calibrates does so on two Brown files, --texts others and as many stretches of the Lee news are
measured, 2048 tokens each. Retrieval: eight telephone numbers are spread over a Brown text, and asked for at its end one after the other; a number
counts where every digit of it is the most likely token after the right ones before it. --needles texts of eight numbers each.

Density is the share of the pairs of blocks below the diagonal that are read, in the mean of layers, heads and texts; blocks are 64 × 64, and
32 × 32 at an eighth of them. All layers are sparse, and all queries. The model computes in bfloat16 (--dtype), attention in float32. A method is one
line of METHODS, with its levels.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import subjects as language
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsify_compiler.attention_taps import with_taps
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention._sites import KIND, attention_sites
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.quality_text import Haystack, haystack, numbers_found

LENGTH, BINS, ASKED, DIGITS = 2048, 4, 8, 5
ALWAYS = ("select_blocks(always=(Windows(size={size}), Sinks(tokens={size})), scorer='{scorer}', selector='{selector}', "
          "block_q={size}, block_k={size})")
SIZES = (64, 64, 32)  # of blocks: of an eighth of 2048 tokens the beginning and the diagonal would be all in blocks of 64
BLOCKS, SHARES = (9, 4, 4), (0.48, 0.23, 0.12)
TOKENS = tuple(size * blocks for size, blocks in zip(SIZES, BLOCKS, strict=True))


def levels(recipe: str, *options: str) -> tuple[str, ...]:
    """A recipe with these options, one for each level, in that level's blocks."""
    return tuple(f"{recipe}({option}, block={size})" for option, size in zip(options, SIZES, strict=True))


def by_tokens(recipe: str) -> tuple[str, ...]:
    return levels(recipe, *(f"tokens={tokens}" for tokens in TOKENS))


def by_share(recipe: str) -> tuple[str, ...]:
    return levels(recipe, *(f"share={share}" for share in SHARES))


def by_mass(recipe: str, *masses: float) -> tuple[str, ...]:
    return levels(recipe, *(f"mass={mass}" for mass in masses))


def by_blocks(scorer: str) -> tuple[str, ...]:
    """Every query block reads as many blocks, so that the beginning of a text is dense."""
    return tuple(ALWAYS.format(scorer=scorer, selector=f"top_k(share=0.0, blocks={blocks})", size=size)
                 for blocks, size in zip(BLOCKS, SIZES, strict=True))


METHODS: dict[str, tuple[str, ...]] = {  # name -> pipelines at about 48, 23 and 12 % of the blocks
    "streaming": levels("streaming", *(f"window={tokens - 2 * size + 1}, sinks={size}" for tokens, size in zip(TOKENS, SIZES, strict=True))),
    "pooled": by_blocks("pooled"),
    "gaussian": by_blocks("gaussian"),
    "page bounds (quest)": by_blocks("page_bounds"),
    "antidiagonal": by_blocks("antidiagonal"),
    "vertical slash": by_blocks("vertical_slash"),
    "sampled rows": by_blocks("sampled_rows"),
    "exact scores": by_blocks("sampled_rows(rows=0)"),  # what no scorer can beat by much
    "pooled, share of a row": tuple(ALWAYS.format(scorer="pooled", selector=f"top_k(share={share})", size=64) for share in (0.5, 0.25, 0.125)),
    "minference": by_tokens("minference"),
    "mixed heads": by_share("mixed_heads"),
    "moa": by_share("moa"),
    "lserve": levels("lserve", "tokens=896, window=224", "tokens=384, window=96", "tokens=192, window=48"),
    "double sparsity": by_tokens("double_sparsity"),
    "twilight": by_mass("twilight", 0.95, 0.8, 0.7),
    "xattention": by_mass("xattention", 0.95, 0.75, 0.65),
    "sparge_attn": by_mass("sparge_attn", 0.95, 0.75, 0.65),
    "sample_attention": by_mass("sample_attention", 0.95, 0.5, 0.2),
    "proxy_attn": by_mass("proxy_attn", 0.95, 0.75, 0.65),
    "seer_attention": levels("seer_attention", "share=0.004", "share=0.02", "share=0.06"),
    "gate (seer), by number": by_blocks("gate"),
    "pbs_attn": levels("pbs_attn", "mass=0.8, segment=256", "mass=0.5, segment=64", "mass=0.3, segment=64"),
    "scatterbrain": levels("scatterbrain", "share=0.4", "share=0.2", "share=0.1"),
}


class Subject:
    """SmolLM2, whose attentions compute what the indexers in `now` say, and add up what they read."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model, self.tokenizer = language.smollm2(arguments.cache)
        calibrated, measured = language.brown(arguments.brown, language.split_of(arguments))
        self.batches = [{"input_ids": self.tokens(text)[None]} for text in calibrated[7::200][:2]]
        self.texts = {"Brown": [self.tokens(text) for text in evenly(measured, arguments.texts)]}
        if language.split_of(arguments) == "held out":
            news = torch.tensor(self.tokenizer(language.lee()).input_ids)
            self.texts["Lee"] = list(news[: arguments.texts * LENGTH].view(-1, LENGTH))
        rng = random.Random(0)
        self.needles = [self.needle(text, rng) for text in evenly(measured[1:], arguments.needles)]
        self.captured = language.capture(model.to(getattr(torch, arguments.dtype)), self.batches[0])
        self.sites = attention_sites(self.captured, Context(), KIND, ())
        self.now: Mapping[str, Indexer] = {}
        self.learned: Mapping[str, Mapping[str, Tensor]] = {}
        self.read: list[float] = []
        self.model = with_taps(self.captured, self.sites, self.attention)

    def attention(self, path: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        assert causal
        assert mask is None
        given = query.float(), key.float(), value.float()
        if path not in self.now:
            return attend.dense(*given, is_causal=True, scale=scale).to(query.dtype)
        factor, weights = query.shape[-1] ** -0.5 if scale is None else scale, self.learned.get(path, {})
        layout = self.now[path].layout(given[0], given[1], True, factor, None, weights)
        self.read.append(layout.density())
        if layout.left is not None:
            return self.now[path].branch(*given, None, None, True, factor, weights)[0].to(query.dtype)
        return layout.attend(*given, scale=factor)[0].to(query.dtype)

    def tokens(self, text: str) -> Tensor:
        found = torch.tensor(self.tokenizer(text).input_ids[:LENGTH])
        assert len(found) == LENGTH
        return found

    def needle(self, text: str, rng: random.Random) -> Haystack:
        return haystack(self.tokenizer(text).input_ids, lambda piece: self.tokenizer(piece).input_ids, LENGTH, rng, ASKED, DIGITS)

    def measure(self, text: str) -> dict[str, Any]:
        """Of a pipeline: density, perplexities, losses by quarters of the text, and the share of numbers that were found, by place."""
        if text:
            program = Pipeline.parse(text).run(self.captured, Context(batches=self.batches))
            self.now = {path: Indexer.parse(indexer) for path, indexer in program.attentions.items()}
            self.learned = program.learned
        self.read = []
        found: dict[str, Any] = {}
        quarters = []
        for name, texts in self.texts.items():
            losses = torch.stack([self.losses(tokens) for tokens in texts])
            found[f"perplexity {name}"] = math.exp(float(losses.mean()))
            quarters.append(losses)
        found["by position"] = [math.exp(float(part.mean())) for part in torch.cat(quarters).tensor_split(BINS, 1)]
        places = numbers_found(lambda input_ids: self.model(input_ids=input_ids, use_cache=False), self.needles)
        found["retrieval"] = sum(map(sum, places)) / max(sum(map(len, places)), 1)
        found["retrieval by place"] = [sum(place) / max(len(place), 1) for place in places]
        return {"density": sum(self.read) / len(self.read) if self.read else 1.0, **found}

    def logits(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        return found

    def losses(self, tokens: Tensor) -> Tensor:
        return cross_entropy(self.logits(tokens)[:-1].float(), tokens[1:], reduction="none")


def evenly(texts: list[str], count: int) -> list[str]:
    return [texts[i * len(texts) // count] for i in range(count)]


def main() -> None:
    parser = language.options(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--needles", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--levels", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    cells = [("dense", "")] + [(name, METHODS[name][level] if name in METHODS else name) for level in arguments.levels for name in arguments.methods]
    missing = [cell for cell in cells if cell not in [(row["method"], row["pipeline"]) for row in rows]]
    subject = Subject(arguments) if missing else None
    for name, text in missing:
        assert subject is not None
        rows.append({"method": name, "pipeline": text, **subject.measure(text)})
        Console(stderr=True).print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()))
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2))
    show(rows)
    if arguments.plot:
        plot(rows, arguments.plot)


def loss(row: dict[str, Any], dense: dict[str, Any]) -> float:
    """Increase of perplexity in percent, in the geometric mean of the texts."""
    keys = [key for key in dense if key.startswith("perplexity")]
    return 100 * (math.exp(sum(math.log(row[key] / dense[key]) for key in keys) / len(keys)) - 1)


def show(rows: list[dict[str, Any]]) -> None:
    console, dense = Console(width=150), rows[0]
    measures = [key for key in dense if key.startswith("perplexity")]
    table = Table(title="SmolLM2 at 2048 tokens")
    for column in ("method", "density", *measures, "increase", *(f"quarter {i + 1}" for i in range(BINS)), "retrieval"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        quarters = [f"{100 * (found / best - 1):+.1f} %" for found, best in zip(row["by position"], dense["by position"], strict=True)]
        table.add_row(row["method"], f"{row['density']:.3f}", *(f"{row[key]:.2f}" for key in measures), f"{loss(row, dense):+.2f} %", *quarters,
                      f"{100 * row['retrieval']:.0f} %")
    console.print(table)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 5.5))
    dense, names = rows[0], list(dict.fromkeys(row["method"] for row in rows[1:]))
    for number, name in enumerate(names):
        points = sorted((row["density"], loss(row, dense), 100 * row["retrieval"]) for row in rows if row["method"] == name)
        density, increase, retrieval = zip(*points, strict=True)
        style = {"marker": "osv^DPX"[number % 7], "linestyle": ("-", "--", ":")[number // 7 % 3], "label": name, "markersize": 5}
        left.plot(density, increase, **style)
        right.plot(density, retrieval, **style)
    left.set_yscale("symlog", linthresh=1)
    left.axhline(1, color="gray", linewidth=0.8)
    right.axhline(100 * dense["retrieval"], color="gray", linewidth=0.8)
    left.set_ylabel("perplexity, increase in %")
    right.set_ylabel("numbers retrieved, %")
    for axis in (left, right):
        axis.set_xlabel("blocks read / blocks below the diagonal")
        axis.grid(alpha=0.3)
    right.legend(*left.get_legend_handles_labels(), fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    main()
