"""Every linear shape of MiniLM and MPNet, or others, sparse, against the fastest dense form of torch of the same layer in the same process.

    python benchmarks/linear.py [--density 0.1] [--shapes 4096x4096] [--rows 1 16 128] [--structures 16x1 csr] [--threads 2] [--cold] [--json FILE]

Dense forms: torch eager, torch.compile (where a C++ compiler exists) and oneDNN with prepacked weights, each in float32 and bfloat16.
All forms of a cell take turns, so that drift meets them alike; a cell shows the median over rounds of dense time / our time, then the ratio of
the fastest rounds; the JSON has the quartiles too. On a busy machine only the second means anything, and on one thread: a parallel region waits
for its slowest thread, so a descheduled one costs milliseconds to whichever form it meets. The title tells the load.

"fp32" is our float32 kernel against the fastest float32 form, "bf16" the same in bfloat16, "any" our float32 kernel against the fastest form of
either dtype. A second table has the dense forms alone, and ours on AMX tiles beside them where the machine has them; it is not among the rivals.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler import catalog
from sparsify_compiler.codegen import runtime
from sparsify_compiler.target import host

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072))  # out × in
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STRUCTURES: Mapping[str, tuple[str, dict[str, int]]] = {
    "32x32": ("bsr", {"r": 32, "c": 32}),
    "32x1": ("bsr", {"r": 32, "c": 1}), "16x1": ("bsr", {"r": 16, "c": 1}), "4x1": ("bsr", {"r": 4, "c": 1}),
    "csr": ("csr", {}), "condensed": ("condensed", {}), "2:4": ("nm", {"n": 2, "m": 4}),
}
OURS = "amx"
Form = Callable[[Tensor], Tensor]


def mask_of(structure: str, n: int, k: int, density: float) -> Tensor:
    """A random mask [n, k]; 2:4 has its own density."""
    name, sizes = STRUCTURES[structure]
    if name == "bsr":
        blocks = torch.rand(-(-n // sizes["r"]), k // sizes["c"]) < density
        return blocks.repeat_interleave(sizes["r"], 0)[:n].repeat_interleave(sizes["c"], 1)
    if name == "nm":
        return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, torch.rand(n, k // 4, 4).topk(2, 2).indices, True).view(n, k)
    noise = torch.rand(n, k)
    return noise < density if name == "csr" else torch.zeros(n, k, dtype=torch.bool).scatter_(1, noise.topk(round(k * density), 1).indices, True)


def dense_forms(weight: Tensor, bias: Tensor, rows: int) -> dict[str, Form]:
    """Every dense way to run this layer that is there."""
    forms: dict[str, Form] = {"eager": lambda x: linear(x, weight, bias)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        forms["prepacked"] = lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        forms["prepacked"](torch.zeros(rows, weight.shape[1], dtype=weight.dtype))
    except (RuntimeError, AttributeError):
        forms.pop("prepacked", None)
    if _has_compiler():
        torch._dynamo.reset()
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype).eval()
        layer.weight.data, layer.bias.data = weight, bias
        compiled = torch.compile(layer)
        try:
            compiled(torch.zeros(rows, weight.shape[1], dtype=weight.dtype))
            forms["compiled"] = compiled
        except Exception as error:  # noqa: BLE001 (whatever the compiler of this machine does, the other forms count)
            Console(stderr=True).print(f"torch.compile is left out: {type(error).__name__}")
    return forms


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # noqa: BLE001 (it raises a private error where there is none)
        return False


def interleaved(forms: Mapping[str, Callable[[], object]], rounds: int, cold: bool) -> dict[str, list[float]]:
    """Seconds of each form in each round; a form gets as many calls a round as take about a millisecond, or one, if cold."""
    calls = {}
    for name, form in forms.items():
        form()
        begin = time.perf_counter()
        for _ in range(3):
            form()
        calls[name] = max(1, min(50, int(3e-3 / (time.perf_counter() - begin))))
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            count = 1 if cold else calls[name]
            if not cold:
                form()
            begin = time.perf_counter()
            for _ in range(count):
                form()
            taken[name].append((time.perf_counter() - begin) / count)
    return taken


def cell(structures: list[str], n: int, k: int, rows: int, density: float, rounds: int, cold: bool) -> list[dict[str, Any]]:
    """All structures and all dense forms of one shape and number of rows."""
    forms: dict[str, Callable[[], object]] = {}
    weight, bias, x = torch.randn(n, k), torch.randn(n), torch.randn(rows, k)
    for word, dtype in DTYPES.items():
        w, b, inputs = weight.to(dtype), bias.to(dtype), x.to(dtype)
        for name, form in dense_forms(w, b, rows).items():
            forms[f"{word} {name}"] = lambda form=form, inputs=inputs: form(inputs)
        for candidate in runtime.candidates("linear", {"weight": w}, {}, dtype, (rows,), host()):
            if candidate.options["family"] == "amx":
                kernel = candidate.bind(b)
                forms[f"{word} dense {OURS}"] = lambda kernel=kernel, inputs=inputs: kernel(inputs)
        for structure in structures:
            format_name, sizes = STRUCTURES[structure]
            stored = catalog.get("format", format_name).encode(w, mask_of(structure, n, k, density), **sizes)
            found = runtime.candidates(f"linear_{format_name}", stored.tensors(), stored.attributes(), dtype, (rows,), host())
            for candidate in found:
                kernel = candidate.bind(b)
                forms[f"{word} {structure} {candidate.name}"] = lambda kernel=kernel, inputs=inputs: kernel(inputs)
    with torch.inference_mode():
        taken = interleaved(forms, rounds, cold)
    return [_row(structure, n, k, rows, taken) for structure in structures]


def _row(structure: str, n: int, k: int, rows: int, taken: Mapping[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) * 1e6 for name, values in taken.items()}
    dense = {word: [name for name in taken if name.split()[0] == word and len(name.split()) == 2] for word in DTYPES}
    ours = {word: min((name for name in taken if name.startswith(f"{word} {structure} ")), key=medians.__getitem__) for word in DTYPES}
    row: dict[str, Any] = {"structure": structure, "out": n, "in": k, "rows": rows, "us": medians}
    for word, mine, rivals in (("fp32", "fp32", dense["fp32"]), ("bf16", "bf16", dense["bf16"]), ("any", "fp32", dense["fp32"] + dense["bf16"])):
        best = min(rivals, key=medians.__getitem__)
        ratios = sorted(theirs / own for theirs, own in zip(taken[best], taken[ours[mine]], strict=True))
        row[word] = {"ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4], "high": ratios[-1 - len(ratios) // 4],
                     "of minima": min(min(taken[name]) for name in rivals) / min(taken[ours[mine]]), "rival": best, "kernel": ours[mine],
                     "us": medians[ours[mine]]}
    return row


def show(results: list[dict[str, Any]], title: str) -> None:
    table = Table("structure", "out×in", "rows", "kernel fp32 µs", "× fp32", "kernel bf16 µs", "× bf16", "fp32 × any", "fastest dense", title=title)
    for row in results:
        cells = [row[word] for word in ("fp32", "bf16", "any")]
        ratios = [f"[{'green' if min(c['ratio'], c['of minima']) > 1 else 'red'}]{c['ratio']:.2f} {c['of minima']:.2f}" for c in cells]
        table.add_row(row["structure"], f"{row['out']}×{row['in']}", str(row["rows"]), f"{row['fp32']['us']:.1f}", ratios[0],
                      f"{row['bf16']['us']:.1f}", ratios[1], ratios[2], f"{row['any']['rival']} {row['us'][row['any']['rival']]:.0f} µs")
    Console(width=150).print(table)


def show_dense(results: list[dict[str, Any]], title: str) -> None:
    names = list(dict.fromkeys(name for row in results for name in row["us"] if len(name.split()) == 2 or name.endswith(f"dense {OURS}")))
    table = Table("out×in", "rows", *names, title=title)
    seen = {(row["out"], row["in"], row["rows"]): row["us"] for row in results}
    for (n, k, rows), us in seen.items():
        table.add_row(f"{n}×{k}", str(rows), *(f"{us[name]:.0f}" if name in us else "–" for name in names))
    Console(width=150).print(table)


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="out x in, e.g. 4096x4096")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", action="store_true", help="one call of a form at a time: others have pushed its weights out of the inner caches")
    parser.add_argument("--json", help="also write all numbers to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    results = [row for n, k in options.shapes for rows in options.rows
               for row in cell(options.structures, n, k, rows, options.density, options.rounds, options.cold)]
    results.sort(key=lambda row: options.structures.index(row["structure"]))
    load = max(load, os.getloadavg()[0])
    title = f"density {options.density}, {'one call at a time, ' if options.cold else ''}{options.threads} threads, {host().mcpu}, load {load:.1f}"
    show(results, f"{title}: times the fastest dense form (median, of minima)")
    show_dense(results, f"{title}: dense forms, µs")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
