"""What using the compiler costs: import, compile with a cold and a warm kernel cache, peak memory, and the thread pool's neighbour test.

    python benchmarks/overheads.py [--json FILE]

Each figure comes from a process of its own. Import is CPU time beyond torch's own import. Memory is the peak resident size of compiling a BERT-base
shaped encoder (random weights, 438 MB) less that of compiling a two-layer one, which has the same fixed costs (torch, TVM, export), as a
multiple of the model's own bytes; the model itself is one of those multiples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORT = "import sys, time, torch; t = time.process_time(); import sparsify_compiler; print(time.process_time() - t)"
COMPILE = """
import sys, time; sys.path.insert(0, {benchmarks!r})
import torch, sparsify_compiler as sc
from model import encoder
model, example = encoder(8, 64)
start = time.perf_counter()
sc.compile(model, example, recipe=sc.recipes.wanda(structure="16x1"), budget=sc.Budget(density=0.1), calibration=[example])
print(time.perf_counter() - start)
"""
MEMORY = """
import resource, torch, sparsify_compiler as sc
from transformers import BertConfig, BertModel
config = BertConfig() if {large} else BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=100)
model = BertModel(config).eval()
example = {{"input_ids": torch.randint(0, 100, (1, 64))}}
sc.compile(model, example, recipe=sc.recipes.wanda(structure="16x1"), budget=sc.Budget(density=0.5), calibration=[example])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = {"import beyond torch, s": sorted(run(IMPORT)[0] for _ in range(5))[2]}
    with tempfile.TemporaryDirectory() as cache:
        code = COMPILE.format(benchmarks=str(Path(__file__).parent))
        figures["compile MiniLM, cold cache, s"] = run(code, cache)[0]
        figures["compile MiniLM, warm cache, s"] = sorted(run(code, cache)[0] for _ in range(3))[1]
        large, model = run(MEMORY.format(large=True), cache)
        figures["peak memory / model"] = (large - run(MEMORY.format(large=False), cache)[0]) / model
    for name, value in figures.items():
        print(f"{name:32} {value:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


def run(code: str, cache: str | None = None) -> list[float]:
    """The numbers on the last line that a fresh interpreter prints."""
    environment = {**os.environ, **({"SPARSIFY_CACHE": cache} if cache else {}), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return [float(word) for word in done.stdout.strip().splitlines()[-1].split()]


if __name__ == "__main__":
    main()
