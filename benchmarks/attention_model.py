"""Whole language models with sparse attention: a long prompt and tokens after a long text, by blocks and with caches of several kinds.

    python benchmarks/attention_model.py build --brown FOLDER --saved FILE          # measures the lengths
    python benchmarks/attention_model.py speed --brown FOLDER --saved FILE [--prompt 4096] [--text 8192] [--tokens 16]
    python benchmarks/attention_model.py quality --brown FOLDER [--texts 1] [--needles 1]

SmolLM2-135M (subjects.py). speed, float32: the model as it is (SDPA), the same with attention of all keys by our kernel (of a token by torch's, the
heads of a group together, on our cache), streaming(512, 64), and an eighth of the blocks, found by pooled keys and by bounds of pages; a prompt once,
and a token after a text of --text tokens (keys are random: what they hold does not matter to time). quality, bfloat16: perplexity of the last 256 of
1024 tokens after the ones before were read as a prompt into the cache; which of eight numbers are found, the prompt being 2048 tokens without the
questions; and bytes of the cache after the 1024 tokens, kind by kind.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import subjects as language
import torch
from attention_quality import LENGTH, Subject, evenly
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.library_attention import give_indexers
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.quality_text import Haystack
from sparsify_compiler.target import host

EVERYTHING = "select_blocks(always=(Everything(),), dense_below=1000000000)"
FOUND = "select_blocks(always=(Windows(size=64), Sinks(tokens=64)), scorer='{}', selector='top_k(share=0.125)') | lower()"
FORMS = {"all keys, our kernel": "lower()", "streaming(512, 64)": "streaming(window=512, sinks=64) | lower()",
         "pooled, an eighth": FOUND.format("pooled"), "page bounds, an eighth": FOUND.format("page_bounds")}
STRETCH, LAST, QUESTION = 1024, 256, 8  # tokens: of a text, of what is asked of it, of a question before its number
CACHES: dict[str, Callable[[Any], Any]] = {
    "everything": lambda model: DynamicCache(),
    "8 bits": lambda model: sc.quantized_cache(8),
    "4 bits": lambda model: sc.quantized_cache(4),
    "2 bits": lambda model: sc.quantized_cache(2),
    "2 bits, rank 4, 2 % exact (GEAR)": lambda model: sc.quantized_cache(2, rank=4, outliers=0.02),
    "4 bits, rank 4, 2 % exact (GEAR)": lambda model: sc.quantized_cache(4, rank=4, outliers=0.02),
    "keys of rank 96 of 192 (ShadowKV)": lambda model: sc.low_rank_cache(96, 256, model),
    "keys of rank 48 of 192 (ShadowKV)": lambda model: sc.low_rank_cache(48, 256, model),
    "half of the prompt": lambda model: sc.evicting_cache(share=0.5),
    "a fifth of the prompt": lambda model: sc.evicting_cache(share=0.2),
    "mass .95 in 4 bits, the rest in 2 (ZipVL)": lambda model: sc.mixed_cache(mass=0.95),
    "mass .8 in 4 bits, the rest in 2": lambda model: sc.mixed_cache(mass=0.8),
    "mass .95 (ZipVL's ratio alone)": lambda model: sc.evicting_cache(mass=0.95),
    "a fifth, half on after layer 15 (FastKV)": lambda model: sc.evicting_cache(share=0.2, layer=14, passed=0.5),
}


def compiled(model: Any, text: str) -> CompiledModel:
    """The model through a pipeline, its attention lowered where it says so."""
    ids = torch.ones(1, 32, dtype=torch.long)
    program = capture(model, {"input_ids": ids, "use_cache": True}, {"input_ids": {0: "batch", 1: "tokens"}})
    return CompiledModel(Pipeline.parse(text).run(program, Context(target=host(), kernels=runtime)))


def filled(model: Any, tokens: int) -> DynamicCache:
    """A cache of so many random keys and values."""
    config, cache = model.config, DynamicCache()
    shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=torch.float32), torch.randn(shape, dtype=torch.float32), layer)
    return cache


class Texts(Subject):
    """The texts and numbers of attention_quality.py, and the model as it is."""

    def __init__(self, given: argparse.Namespace) -> None:
        model, self.tokenizer = language.smollm2(given.cache)
        _, measured = language.brown(given.brown, language.split_of(given))
        news = torch.tensor(self.tokenizer(language.lee()).input_ids)
        rng = random.Random(0)
        self.texts = {"Brown": [self.tokens(text) for text in evenly(measured, given.texts)],
                      "Lee": list(news[:given.texts * LENGTH].view(-1, LENGTH))}
        self.needles = [self.needle(text, rng) for text in evenly(measured[1:], given.needles)]
        self.model = model.bfloat16()


def build(given: argparse.Namespace) -> None:
    model, _ = language.smollm2(given.cache)
    given.saved.write_text(json.dumps({name: compiled(model, text).program.attentions for name, text in FORMS.items()}, indent=2))


def with_attentions(model: Any, attentions: dict[str, str]) -> Any:
    """A copy whose attention alone is what was compiled: its linear layers are those of the model as it is."""
    made = copy.deepcopy(model)
    give_indexers(made, attentions, {})
    return made


def speed(given: argparse.Namespace) -> None:
    model, _ = language.smollm2(given.cache)
    models: dict[str, Any] = {"SDPA": model, **{name: with_attentions(model, found) for name, found in json.loads(given.saved.read_text()).items()}}
    ids = torch.randint(1, 49000, (1, given.prompt))
    prompts = {name: (lambda one=one: one(input_ids=ids, use_cache=True, logits_to_keep=1)) for name, one in models.items()} if given.prompt else {}
    token = ids[:, :1] if given.prompt else torch.ones(1, 1, dtype=torch.long)
    caches = {name: filled(model, given.text) for name in models} if given.text else {}
    steps = {name: (lambda one=models[name], held=held: one(input_ids=token, past_key_values=held, use_cache=True)) for name, held in caches.items()}
    table = Table(title=f"SmolLM2, float32, {torch.get_num_threads()} threads: ms, and times as fast as SDPA")
    for column in ("", *models):
        table.add_column(column, justify="right")
    for title, forms, rounds in ((f"prompt of {given.prompt}", prompts, 3), (f"token after {given.text}", steps, given.tokens)):
        if forms:
            found = interleave(forms, rounds=rounds, warmup=1, at_most=45.0, repeats=1)
            table.add_row(title, *(f"{t.median:.0f} ({found['SDPA'].median / t.median:.2f})" for t in found.values()))
    Console(width=120).print(table)


def bytes_of(cache: Any) -> int:
    """What a cache holds, room for more aside."""
    return sum(layer.resident_bytes() if hasattr(layer, "resident_bytes") else layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def continued(model: Any, ids: Tensor, cache: Any, asked: int) -> Tensor:
    """Logits of the last `asked` tokens, the ones before being a prompt that the cache holds as it does."""
    model(input_ids=ids[:, :-asked], past_key_values=cache, use_cache=True)
    made: Tensor = model(input_ids=ids[:, -asked:], past_key_values=cache, use_cache=True).logits[0, :-1]
    return made


def quality(given: argparse.Namespace) -> None:
    subject = Texts(given)
    model = compiled(subject.model, EVERYTHING)
    table = Table(title=f"SmolLM2: the last {LAST} of {STRETCH} tokens, the others as a prompt in the cache")
    for column in ("cache", "MB", *subject.texts, "increase", "numbers"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    dense: list[float] = []
    for name in given.caches:
        make, losses, held = CACHES[name], [], None
        for texts in subject.texts.values():
            found = []
            for tokens in texts:
                ids, held = tokens[None, :STRETCH], make(subject.model)
                found.append(float(cross_entropy(continued(model, ids, held, LAST).float(), ids[0, 1 - LAST:])))
            losses.append(sum(found) / len(found))
        dense = dense or losses
        more = math.exp(sum(losses) / len(losses) - sum(dense) / len(dense)) - 1
        right = [ok for text in subject.needles for ok in numbers(model, text, make(subject.model))]
        table.add_row(name, f"{bytes_of(held) / 1e6:.2f}", *(f"{math.exp(loss):.2f}" for loss in losses), f"{100 * more:+.2f} %",
                      f"{sum(right)} of {len(right)}")
        Console(stderr=True).print(name, losses, sum(right))
    Console(width=140).print(table)


def numbers(model: Any, text: Haystack, cache: Any) -> list[bool]:
    """Which numbers are found where every question before was answered rightly."""
    tokens, asked = text.tokens, text.asked
    first = min(start for _, start, _ in asked) - QUESTION
    likely = continued(model, tokens[None], cache, len(tokens) - first).argmax(-1)
    return [torch.equal(likely[start - 1 - first:stop - 1 - first], tokens[start:stop]) for _, start, stop in asked]


def main() -> None:
    parser = language.options(__doc__)
    parser.add_argument("what", choices=["build", "speed", "quality"])
    parser.add_argument("--saved", type=Path, default=Path("attentions.json"))
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--text", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES), help="what is measured against the first of them")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--needles", type=int, default=1)
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    {"build": build, "speed": speed, "quality": quality}[given.what](given)


if __name__ == "__main__":
    main()
