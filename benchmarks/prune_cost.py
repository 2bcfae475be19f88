"""What pruning a whole language model costs: seconds and peak memory of SparseGPT on SmolLM2, and what a killed run loses.

    python benchmarks/prune_cost.py --brown FOLDER [--recipe sparsegpt]
    python benchmarks/prune_cost.py --brown FOLDER --kill-after 20       # in seconds of pruning; SIGKILL, start again, compare with a whole run

Each run is a process of its own, with SPARSIFY_CHECKPOINT in a temporary folder where it is to be killed. Memory is the process's resident peak,
beside what it was when the model and the calibration batches were loaded. Calibration as in prune_quality.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from subjects import SmolLM2, options

from sparsify_compiler import recipes
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.passes_api import Context
from sparsify_compiler.progress import display

MIB = 1 << 20


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--recipe", default="sparsegpt", choices=["sparsegpt", "aligned"])
    parser.add_argument("--kill-after", type=float)
    arguments = parser.parse_args()
    if arguments.kill_after is None:
        prune(arguments)
        return
    own = [sys.executable, __file__, "--brown", str(arguments.brown), "--recipe", arguments.recipe, "--samples", str(arguments.samples)]
    own += ["--cache", str(arguments.cache)] if arguments.cache else []
    print("whole run:", digest_of(subprocess.run(own, capture_output=True, text=True, check=True).stdout))
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "SPARSIFY_CHECKPOINT": folder}
        killed = subprocess.Popen(own, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = 0.0
        while not started or time.monotonic() - started < arguments.kill_after:
            time.sleep(0.05)
            started = started or (time.monotonic() if any(Path(folder).rglob("*.safetensors")) else 0.0)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        print("killed with", len(list(Path(folder).rglob("*.safetensors"))), "layers finished, exit status", killed.returncode)
        print("resumed:  ", digest_of(subprocess.run(own, env=environment, capture_output=True, text=True, check=True).stdout))


def digest_of(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("pruned"))


def prune(arguments: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    subject = SmolLM2(arguments)
    model_bytes = sum(weight.numel() * weight.element_size() for weight in {id(w): w for w in subject.model.parameters()}.values())
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
    start = time.perf_counter()
    with display(True) as progress:
        ctx = Context(batches=subject.batches, progress=progress)
        ctx.calibrate = lambda program, needs: calibrate(program, subject.batches, needs, cache=False)
        pruned = getattr(recipes, arguments.recipe)("unstructured", 0.5).run(subject.captured, ctx, ())
    seconds = time.perf_counter() - start
    found = hashlib.sha256()
    for name, tensor in sorted(instantiate(pruned).state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    print(f"pruned in {seconds:.1f} s with {torch.get_num_threads()} threads: sha256 {found.hexdigest()[:16]}")
    peak = resident("VmHWM")
    print(f"model {model_bytes / MIB:.0f} MiB; resident before {before / MIB:.0f} MiB, at most {peak / MIB:.0f}: {(peak - before) / MIB:.0f} more")


def resident(which: str) -> int:
    """Bytes: VmRSS is what the process holds now, VmHWM the most that it held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
