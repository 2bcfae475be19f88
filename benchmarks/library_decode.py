"""Tokens of SmolLM2 from a library without PyTorch, beside eager torch, torch.compile and our own PyTorch runtime: milliseconds a token.

    python benchmarks/library_decode.py prepare FOLDER --brown FOLDER --cache FOLDER [--case dense selected blocks] [--dtype fp32 bf16] [--runtime]
    python benchmarks/library_decode.py measure FOLDER --cache FOLDER [--case ...] [--dtype fp32] [--prompt 8 512] [--rounds 5]

Cases: every layer as it is; half of the inputs selected for each token (TEAL); half of the weights in blocks of 16x1 (Wanda), the tied head whole in
both. Batch 1, greedy. Contenders have processes of their own, because TVM's threads and torch's would fight for the processors, and take turns; a
token's time is that of --tokens more after a prompt. torch.compile is generate()'s own with a static cache, one step as one graph.
--runtime compiles for our PyTorch runtime too, with the cache of generate().
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = {"dense": "pack()", "selected": "select_inputs() | pack()",
           "blocks": "mask_weights(score=weight_times_input_norm, structure='16x1', ignore=('re:.*head',)) | pack()"}
DENSITY = 0.5
EAGER, COMPILED, RUNTIME, LIBRARY = "torch eager", "torch.compile", "our PyTorch runtime", "library"


def prepare(arguments: argparse.Namespace) -> None:
    """Compile and export; what is there already stays."""
    import decode
    import torch

    import sparsify_compiler as sc

    torch.set_grad_enabled(False)
    for dtype in arguments.dtype:
        arguments.build = True
        model, batches = decode.smollm2(arguments, decode.DTYPES[dtype])
        for case in arguments.case:
            budget = None if case == "dense" else sc.Budget(density=DENSITY)
            for form, options, recipe in ((LIBRARY, {"use_cache": False}, RECIPES[case]), (RUNTIME, {}, f"{RECIPES[case]} | lower(rounds=5)")):
                place = arguments.folder / f"{case}-{dtype}" / form.rpartition(" ")[2]
                if place.exists() or (form == RUNTIME and not arguments.runtime):
                    continue
                example = {"input_ids": batches[0]["input_ids"][:, :8], **options}
                compiled = sc.compile(model, example, recipe=sc.Pipeline.parse(recipe), budget=budget,
                                      calibration=[{**batch, **options} for batch in batches], dynamic={"input_ids": {0: "batch", 1: "tokens"}},
                                      decoding="parts")
                compiled.export(place, cache=True) if form == LIBRARY else compiled.save(place)


def contender(name: str, arguments: argparse.Namespace) -> Callable[[int, int], float]:
    """Seconds to write so many tokens after a prompt of so many."""
    place = arguments.folder / f"{arguments.case[0]}-{arguments.dtype[0]}" / name.rpartition(" ")[2]
    if name == LIBRARY:
        return of_library(place)
    import decode
    import torch

    import sparsify_compiler as sc

    torch.set_grad_enabled(False)
    arguments.build = False
    dense = decode.smollm2(arguments, decode.DTYPES[arguments.dtype[0]])[0]
    model: Any = sc.load(place, model=dense) if name == RUNTIME else dense
    options = decode.one_graph() if name == COMPILED else {}

    def run(prompt: int, tokens: int) -> float:
        ids = torch.randint(100, 4000, (1, prompt), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)
        return time.perf_counter() - start

    return run


def of_library(place: Path) -> Callable[[int, int], float]:
    sys.path.insert(0, str(place))
    import numpy
    from run import Model

    model = Model(place, check=False)

    def run(prompt: int, tokens: int) -> float:
        ids = numpy.random.default_rng(0).integers(100, 4000, (1, prompt))
        start = time.perf_counter()
        model.generate(ids, tokens)
        return time.perf_counter() - start

    return run


def work(arguments: argparse.Namespace) -> None:
    """A contender's process: reads lengths, answers with milliseconds a token."""
    run = contender(arguments.name, arguments)
    for line in sys.stdin:
        prompt, tokens = json.loads(line)
        first = run(prompt, 2)
        print(json.dumps((run(prompt, 2 + tokens) - first) / tokens * 1e3), flush=True)


class Contender:
    """The process, from outside."""

    def __init__(self, name: str, arguments: argparse.Namespace, case: str, dtype: str) -> None:
        given = ["--name", name, "--case", case, "--dtype", dtype, *(["--cache", str(arguments.cache)] if arguments.cache else [])]
        command = [sys.executable, __file__, "work", str(arguments.folder), *given]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                         env={**os.environ, "OMP_WAIT_POLICY": "passive"})

    def __call__(self, prompt: int, tokens: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps((prompt, tokens)) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(arguments: argparse.Namespace) -> None:
    """All cases of a dtype beside the dense forms of torch."""
    for dtype in arguments.dtype:
        named = [(EAGER, "dense"), *([] if arguments.fast else [(COMPILED, "dense")]), *((LIBRARY, case) for case in arguments.case)]
        named += [(RUNTIME, case) for case in arguments.case if (arguments.folder / f"{case}-{dtype}" / "runtime").exists()]
        running = {key: Contender(key[0], arguments, key[1], dtype) for key in named}
        for prompt in arguments.prompt:
            for one in running.values():
                one(prompt, arguments.tokens)
            times: dict[tuple[str, str], list[float]] = {key: [] for key in running}
            for _ in range(arguments.rounds):
                for key, one in running.items():
                    times[key].append(one(prompt, arguments.tokens))
            for (name, case), found in times.items():
                low, middle, high = statistics.quantiles(found, n=4)
                told = f"{middle:7.2f} ms ({low:.2f} to {high:.2f}), least {min(found):.2f}"
                print(f"{dtype} after {prompt:4d} tokens: {name:20s} {case:9s} {told}", flush=True)
        for one in running.values():
            one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "measure", "work"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--brown", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--case", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--prompt", nargs="+", type=int, default=[8, 512])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtime", action="store_true", help="prepare our PyTorch runtime too")
    parser.add_argument("--fast", action="store_true", help="measure without torch.compile")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    {"prepare": prepare, "measure": measure, "work": work}[arguments.what](arguments)


if __name__ == "__main__":
    main()
