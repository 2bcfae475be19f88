"""Tokens a second of language models whose tokens select their inputs, inside generate(), against the same model dense, interleaved.

    python benchmarks/decode.py --folder FOLDER --build [--model smollm2 llama] [--dtype fp32 bf16] [--recipe "select_inputs()"] [--density 0.5]
    python benchmarks/decode.py --folder FOLDER --build ... --recipe ""         # nothing but dense layers, whatever the density is
    python benchmarks/decode.py --folder FOLDER ...         # the same options: measure what --build has left in FOLDER

"smollm2" is the model of subjects.py, "llama" the shape of Llama-3.2-1B with --layers layers, a vocabulary of 32000 and random weights.
SmolLM2 calibrates on Brown (--brown FOLDER), the other on random tokens. The time of a token is that of --tokens more of them after a prompt of 8,
batch 1, greedy, Python included; both models in eager PyTorch with a dynamic cache, and under torch.compile (generate()'s own, one step as one
graph) with a static one; ours, where a library takes its tokens, in eager PyTorch alone, and without that library ("by parts"). For comparison the
same model compiled dense (--recipe "", where it was built). Medians over --rounds; the gain is the fastest dense form's time over our fastest's, of
each round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import subjects as language
import torch
from rich.console import Console
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.pipeline import Pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--model", nargs="+", choices=["smollm2", "llama"], default=["smollm2", "llama"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--recipe", default="select_inputs()")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--label", default="", help="to tell recipes of one density apart")
    parser.add_argument("--fast", action="store_true", help="measure without torch.compile")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--brown", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in arguments.model:
        for dtype in arguments.dtype:
            place = arguments.folder / f"{name}-{dtype}-{arguments.density if arguments.recipe else 'dense'}{arguments.label}"
            model, batches = {"smollm2": smollm2, "llama": llama}[name](arguments, DTYPES[dtype])
            if arguments.build:
                build(model, batches, arguments).save(place)
            else:
                ours = {"ours": sc.load(place, model=model)}
                if arguments.recipe and (dense := arguments.folder / f"{name}-{dtype}-dense").exists():
                    ours["ours dense"] = sc.load(dense, model=model)
                Console().print(f"{name} {dtype} density {arguments.density}: {measured(model, ours, arguments)}")


def smollm2(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, list[Mapping[str, Tensor]]]:
    model, tokenizer = language.smollm2(arguments.cache)
    texts = language.spread(language.brown(arguments.brown)[0], 4, tokenizer) if arguments.build else torch.randint(100, 4000, (1, 64))
    return model.to(dtype), [{"input_ids": text[None]} for text in texts]


def llama(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[nn.Module, list[Mapping[str, Tensor]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=arguments.layers, num_attention_heads=32,
                         num_key_value_heads=8, max_position_embeddings=512)
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval(), [{"input_ids": torch.randint(1, 30000, (1, 32))}]
    finally:
        torch.set_default_dtype(torch.float32)


def build(model: nn.Module, batches: list[Mapping[str, Tensor]], arguments: argparse.Namespace) -> sc.CompiledModel:
    """The model, compiled for any batch and length."""
    example = {"input_ids": batches[0]["input_ids"][:, :8]}
    recipe = " | ".join(part for part in (arguments.recipe, "pack() | lower(rounds=5)") if part)
    budget = sc.Budget(density=arguments.density) if arguments.recipe else None
    return sc.compile(model, example, recipe=Pipeline.parse(recipe), budget=budget, calibration=batches,
                      dynamic={"input_ids": {0: "batch", 1: "tokens"}}, decoding="library")


def measured(model: Any, ours: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """Milliseconds a token of every form, and the gain of the fastest of `ours["ours"]`."""
    ids = torch.randint(100, 4000, (1, 8))

    def spent(one: Any, tokens: int, options: Mapping[str, Any]) -> float:
        start = time.perf_counter()
        one.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
        return time.perf_counter() - start

    def token(one: Any, options: Mapping[str, Any]) -> float:
        first = spent(one, 2, options)
        return float(spent(one, 2 + arguments.tokens, options) - first) / arguments.tokens * 1e3

    forms: dict[str, tuple[Any, Mapping[str, Any]]] = {"dense": (model, {})}
    if not arguments.fast:
        forms |= {f"{name} under torch.compile": (one, one_graph()) for name, one in (("dense", model), ("ours", ours["ours"]))
                  if getattr(one, "step", None) is None}
    for name, one in ours.items():
        forms[name] = one, {}
        if one.step is not None:
            forms[f"{name} by parts"] = _ByParts(one), {}
    for one, options in forms.values():
        spent(one, 2 + arguments.tokens, options)
    rounds = [{name: token(*form) for name, form in forms.items()} for _ in range(arguments.rounds)]
    middle = {name: statistics.median(times[name] for times in rounds) for name in forms}
    dense = min((name for name in forms if name.startswith("dense")), key=middle.__getitem__)
    best = min((name for name in forms if name.startswith("ours") and not name.startswith("ours dense")), key=middle.__getitem__)
    gains = [times[dense] / times[best] for times in rounds]
    told = ", ".join(f"{name} {value:.1f}" for name, value in middle.items())
    return f"ms a token: {told}; {best} has {statistics.median(gains):.2f} times the speed of {dense} ({min(gains):.2f} to {max(gains):.2f})"


class _ByParts:
    """A compiled model whose library takes no call."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        most, self._model.step.most = self._model.step.most, 0
        try:
            return self._model.generate(*args, **kwargs)
        finally:
            self._model.step.most = most


def one_graph() -> dict[str, Any]:
    """The options of generate() with which it compiles the step of a token: on processors it does so only where told."""
    from transformers.generation import CompileConfig

    how = CompileConfig(fullgraph=False, dynamic=False, mode="default")
    how._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": how}


if __name__ == "__main__":
    main()
