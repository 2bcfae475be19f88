"""A sentence encoder as one library without PyTorch, beside torch and our own PyTorch runtime: latency, cold start, sizes.

    python benchmarks/whole_graph.py prepare DIR        # compiles MiniLM dense and with half of its weights (wanda, 16x1), exports both, builds the
                                                        # C++ program; also for cortex-a76 where a cross compiler and `scripts/arm/sysroot.py` are
    python benchmarks/whole_graph.py measure DIR [--case sparse] [--rounds 9]

Each contender has a process of its own, because TVM's threads and torch's would fight for the processors; they take turns in every round.
Times are medians of the rounds with the range of the middle half; ratios are of those medians, above 1 where the library is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ((1, 16), (1, 128), (8, 128))
CALLS = 4           # in a round
CASES = ("dense", "sparse")
ARM = "cortex-a76"
ROOT = Path(__file__).parent.parent
TORCH = ("torch eager", "torch.compile", "our PyTorch runtime")
LIBRARY = "library"


def prepare(folder: Path, compiled_too: bool) -> None:
    """Everything that takes long."""
    sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts" / "arm")]
    import sysroot
    from compile_minilm import Lee, load_encoder

    import sparsify_compiler as sc

    model, tokenizer = load_encoder()
    batches = Lee(tokenizer).calibration()
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    both = {0: "batch", 1: "length"}
    for case in CASES:
        recipe = sc.recipes.wanda(structure="16x1") if case == "sparse" else "lower()"
        budget = sc.Budget(density=0.5) if case == "sparse" else None
        compiled = sc.compile(model, batches[0], recipe=recipe, target="cpu", budget=budget, calibration=batches,
                              dynamic={"input_ids": both, "attention_mask": both})
        compiled.save(folder / case / "torch")
        compiled.export(folder / case / LIBRARY)
        if shutil.which("aarch64-linux-gnu-gcc"):
            compiled.export(folder / case / ARM, ARM)
    sites = {"": None, ARM: sysroot.root() / "site"} if sysroot.ready() and shutil.which("aarch64-linux-gnu-g++") else {"": None}
    for name, site in sites.items():
        build_program(folder / f"cpp{name}", site)
    if compiled_too:
        for shape in SHAPES:
            _contender("torch.compile", folder, "dense")(*shape)


def build_program(out: Path, site: Path | None) -> None:
    """sparsify_example, for this machine or for aarch64."""
    import tvm_ffi

    here = Path(tvm_ffi.__file__).parent
    command = ["make", "-C", ROOT / "codegen" / "deploy" / "cpp", f"OUT={out.resolve()}", f"INCLUDE={here}/include",
               f"FFI={site / 'tvm_ffi' if site else here}", *(["CXX=aarch64-linux-gnu-g++"] if site else [])]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _contender(name: str, folder: Path, case: str) -> Callable[[int, int], None]:
    """A call on so many sentences of so many tokens."""
    if name == LIBRARY:
        return _library(folder / case / LIBRARY)
    sys.path.insert(0, str(ROOT / "examples"))
    import torch
    from compile_minilm import load_encoder

    import sparsify_compiler as sc

    model: Any = sc.load(folder / case / "torch") if name == TORCH[2] else load_encoder()[0]
    model = torch.compile(model) if name == "torch.compile" else model
    made: dict[tuple[int, int], dict[str, Any]] = {}

    def run(batch: int, length: int) -> None:
        if (batch, length) not in made:
            ids = torch.randint(0, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
            made[batch, length] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            model(**made[batch, length])

    return run


def _library(folder: Path) -> Callable[[int, int], None]:
    sys.path.insert(0, str(folder))
    import numpy
    from run import Model

    model = Model(folder, check=False)

    def run(batch: int, length: int) -> None:
        ids = numpy.random.default_rng(0).integers(0, 30000, (batch, length))
        model.run(input_ids=ids, attention_mask=numpy.ones_like(ids))

    return run


def work(name: str, folder: Path, case: str) -> None:
    """A contender's process: reads shapes, answers with milliseconds a call."""
    run = _contender(name, folder, case)
    for line in sys.stdin:
        batch, length, calls = json.loads(line)
        started = time.perf_counter()
        for _ in range(calls):
            run(batch, length)
        print(json.dumps((time.perf_counter() - started) / calls * 1e3), flush=True)


class Contender:
    """The process, from outside."""

    def __init__(self, name: str, folder: Path, case: str) -> None:
        command = [sys.executable, __file__, "work", str(folder), "--case", case, "--name", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore"})

    def __call__(self, batch: int, length: int, calls: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps((batch, length, calls)) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(folder: Path, case: str, names: list[str], rounds: int) -> None:
    """Latencies by shape, then cold start and sizes."""
    contenders = {name: Contender(name, folder, case) for name in names}
    print(f"MiniLM, {case}; milliseconds a call, middle half of {rounds} rounds")
    for shape in SHAPES:
        for run in contenders.values():
            run(*shape, 3)
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, run in contenders.items():
                times[name].append(run(*shape, CALLS))
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, found in times.items():
            low, _, high = statistics.quantiles(found, n=4)
            ratio = f"  library {medians[name] / medians[LIBRARY]:.2f} times as fast" if name != LIBRARY else ""
            print(f"  {shape[0]} x {shape[1]:<4} {name:20s} {medians[name]:8.2f}  ({low:.2f} to {high:.2f}){ratio}")
    for run in contenders.values():
        run.close()
    cold_start(folder, case)
    sizes(folder, case)


def cold_start(folder: Path, case: str) -> None:
    """The C++ program: a process that loads the model, checks its hashes and runs it once."""
    import tvm_ffi

    ffi = Path(tvm_ffi.__file__).parent / "lib"
    libraries = f"{ffi}:{ffi.parent.parent / 'tvm' / 'lib'}"
    found = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([folder / "cpp" / "sparsify_example", folder / case / LIBRARY, "--size", "length=128"], capture_output=True, text=True,
                              check=True, env={**os.environ, "LD_LIBRARY_PATH": libraries})
        found.append((time.perf_counter() - started, done.stdout.splitlines()[0].rpartition(",")[0]))
    print(f"  cold start in C++, the whole process: {statistics.median(one for one, _ in found) * 1e3:.0f} ms ({found[-1][1]})")


def sizes(folder: Path, case: str) -> None:
    """Of the code, the weights, and what runs them on aarch64."""
    sys.path.insert(0, str(ROOT / "scripts" / "arm"))
    import sysroot

    for name in (LIBRARY, ARM):
        if (folder / case / name).exists():
            code, weights = ((folder / case / name / file).stat().st_size for file in ("model.so", "weights.safetensors"))
            print(f"  {name}: code {code / 1e6:.2f} MB, weights {weights / 1e6:.1f} MB")
    site, program = sysroot.root() / "site", folder / f"cpp{ARM}" / "sparsify_example"
    if program.exists():
        parts = [program, site / "tvm_ffi" / "lib" / "libtvm_ffi.so", site / "tvm" / "lib" / "libtvm_runtime.so"]
        print(f"  aarch64: program and runtime libraries {sum(one.stat().st_size for one in parts) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "measure", "work"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=CASES, default="dense")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a minute")
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.folder, options.compile)
    elif options.what == "work":
        work(options.name, options.folder, options.case)
    else:
        names = [name for name in TORCH if name != "torch.compile" or options.compile]
        measure(options.folder, options.case, [*names, LIBRARY], options.rounds)


if __name__ == "__main__":
    main()
