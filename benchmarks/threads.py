"""One thread pool: a torch op and one of our kernels in turn cost no more than the sum of the two alone, on 1 and 2 threads.

    python benchmarks/threads.py [--json FILE]

Were there two pools, one's spinning threads would hold the processors that the other needs, and the mix would cost a multiple.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from sparsify_compiler.codegen import omp, runtime
from sparsify_compiler.formats.bsr import Bsr
from sparsify_compiler.target import host

ALLOWED = 1.05


def seconds(form: Callable[[], object], calls: int = 5) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        form()
    return (time.perf_counter() - begin) / calls


def measure(rows: int, threads: int, rounds: int = 25) -> dict[str, float]:
    """Microseconds of the op alone, the kernel alone and both in turn, and the median over rounds of mix / sum."""
    torch.set_num_threads(threads)
    mask = (torch.rand(768 // 16, 768) < 0.1).repeat_interleave(16, 0)
    stored = Bsr.encode(torch.randn(768, 768), mask, r=16, c=1)
    kernel = runtime.candidates("linear_bsr", stored.tensors(), stored.attributes(), torch.float32, (rows,), host())[0].bind()
    x, a, b = torch.randn(rows, 768), torch.randn(512, 512), torch.randn(512, 512)

    def op() -> torch.Tensor:
        return torch.mm(a, b)

    def ours() -> torch.Tensor:
        return kernel(x)

    def mix() -> None:
        op()
        ours()

    with torch.inference_mode():
        for form in (op, ours, mix):
            seconds(form)
        taken = [(seconds(op), seconds(ours), seconds(mix)) for _ in range(rounds)]
    alone, own, both = (statistics.median(column) * 1e6 for column in zip(*taken, strict=True))
    return {"threads": threads, "rows": rows, "mm 512x512": alone, "kernel": own, "alternating": both,
            "ratio": statistics.median(t[2] / (t[0] + t[1]) for t in taken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the numbers to this file")
    options = parser.parse_args()
    before = torch.get_num_threads()
    results = [measure(rows, threads) for threads in (1, 2) for rows in (1, 128)]
    torch.set_num_threads(before)
    table = Table("threads", "rows", "mm 512x512 µs", "kernel µs", "alternating µs", "alternating / sum", title=f"kernels run on {omp.status()}")
    for r in results:
        table.add_row(str(r["threads"]), str(r["rows"]), f"{r['mm 512x512']:.0f}", f"{r['kernel']:.1f}", f"{r['alternating']:.0f}",
                      f"[{'green' if r['ratio'] <= ALLOWED else 'red'}]{r['ratio']:.3f}")
    Console().print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
