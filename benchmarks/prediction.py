"""How well the time of a layer is predicted, for layers drawn by a seed; and how the costs of kernels are found, on layers of other seeds.

    python benchmarks/prediction.py --build && python benchmarks/prediction.py [--seed 1] [--points 90] [--json FILE]
    python benchmarks/prediction.py --fit --seed 100 --points 400       # writes cost_models/forms/costs.json
    python benchmarks/prediction.py --kinds others                      # torch's elementwise ops, norms, convolutions and attention

A point is a layer (op, sizes, density, rows, dtype, how much other memory is read between two calls) with all of its forms, dense ones included,
each timed as `sparsify_compiler.work.measure` does. Errors are |predicted / measured - 1|; Kendall's tau is that of the order of a point's forms.
This machine is measured first (`sparsify targets --measure`): what its memory gives changes with what its neighbours do, within minutes.
--build only builds the kernels, which takes minutes where they are not in the cache; run the rest on an otherwise idle machine, with
--seconds to stop early: what was measured is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares
from scipy.stats import kendalltau

from sparsify_compiler import machines
from sparsify_compiler.cost_models import predict
from sparsify_compiler.cost_models.forms import _base
from sparsify_compiler.cost_models.machine import Machine
from sparsify_compiler.cost_models.symbols import TABLE, compiled
from sparsify_compiler.target import host
from sparsify_compiler.work import Work, measure
from sparsify_compiler.work_sample import forms_of

SIZES = (192, 256, 384, 576, 768, 1024, 1536, 2048, 3072, 4096)
ROWS = (1, 1, 1, 2, 4, 8, 16, 32, 64, 128, 128, 256, 512)
DENSITIES = (0.05, 0.1, 0.1, 0.2, 0.3, 0.5)
BETWEEN = (0, 1 << 24, 1 << 26, 1 << 28)
LINEARS = ("bsr", "bsr", "bsr", "nm", "csr", "csr", "condensed", "select_linear", "select_ffn", "select_inputs_ffn")

LARGEST = 5_000_000         # weights of a layer
FITTING = range(100, 200)   # seeds of layers that costs are fitted on; no others are
# What a cost is thought to be where few points say anything of it, and how strongly: a factor of e away counts as much as an error of that.
PRIOR = {"calls": 8.0, "displaced": 2.0, "late": 1.0, "product": 1.5, "loaded": 1.0, "packing": 2.0, "taken": 2.0, "put": 2.0, "operation": 1.5,
         "exponential": 10.0, "moved": 2.0}
PULL = {"late": 0.2}
PULL_OTHERS = 0.02
Point = tuple[Work, str, float]


def elementwise(rng: random.Random) -> dict[str, float]:
    written, taps = 64 * rng.choice((64, 512, 2048, 8192, 32768)), rng.choice((1, 1, 8, 20))
    return {"taps": taps, "written": written, "read": written * rng.choice((1, 2)) if taps == 1 else written}


def convolution(rng: random.Random) -> dict[str, float]:
    side, taken, outputs = rng.choice((7, 14, 28, 56)), rng.choice((16, 32, 64, 128, 256)), rng.choice((16, 32, 64, 128, 256))
    return {"M": side**2, "N": outputs, "K": taken, "taps": rng.choice((1, 9, 9, 25)), "read": taken * side**2, "written": outputs * side**2}


def attention(rng: random.Random) -> dict[str, float]:
    tokens, heads, width = rng.choice((32, 64, 128, 256, 512)), rng.choice((4, 8, 12)), rng.choice((32, 64))
    rows = tokens * heads
    return {"M": rows, "K": width, "E": width, "pairs": rows * tokens, "block_q": 1, "block_k": 1, "listed": 0, "read": 3 * rows * width,
            "written": rows * width}


EAGER = {"elementwise": elementwise, "conv2d": convolution, "attend": attention}
KINDS = {"linears": LINEARS, "others": tuple(EAGER)}


def draw(seed: int, count: int, kinds: Sequence[str] = LINEARS) -> list[Work]:
    """Layers of the shapes, structures and densities that people prune, or torch's other operators."""
    rng = random.Random(seed)
    found: list[Work] = []
    while len(found) < count:
        outputs, inputs, rows = rng.choice(SIZES), rng.choice(SIZES), rng.choice(ROWS)
        dtype, between, density, kind = rng.choice(("float32", "float32", "bfloat16")), rng.choice(BETWEEN), rng.choice(DENSITIES), rng.choice(kinds)
        sizes: dict[str, float] = {"M": rows, "N": outputs, "K": inputs, "density": density}
        op = f"linear_{kind}"
        if kind == "bsr":
            sizes["r"] = rng.choice((4, 8, 16, 16, 32))
            sizes["c"] = rng.choice((1, 1, 1, sizes["r"]))
        elif kind == "nm":
            sizes["n"], sizes["m"] = rng.choice(((2, 4), (2, 4), (1, 4), (2, 8), (4, 8)))
            sizes["density"] = sizes["n"] / sizes["m"]
        elif kind == "csr":
            op = "linear_csr" if density < 1 / 16 else "linear_bitmap"
        elif kind == "select_linear":
            op, sizes["M"] = kind, rng.choice((1, 1, 1, 2, 4, 16))
        elif kind in EAGER:
            op, sizes = kind, EAGER[kind](rng)
        elif kind != "condensed":
            op, width = kind, rng.choice((384, 576, 768))
            sizes |= {"M": rng.choice((1, 1, 1, 2, 16)), "K": width, "N": width, "hidden": rng.choice((768, 1536, 2048))}
        if outputs * inputs <= LARGEST:
            found.append(Work.make(op, dtype, between, **sizes))
    return found


def measured(works: Iterable[Work], seconds: float) -> list[Point]:
    """Every form of these layers, until so many seconds have passed."""
    end, points = time.monotonic() + seconds, []
    for work in works:
        if time.monotonic() > end:
            break
        points += [(work, name, taken) for name, taken in measure(work).items()]
    return points


def form_for(work: Work, name: str, machine: Machine) -> _base.Form:
    """The form of that name. Raises KeyError where the model has none."""
    found = {form.name: form for form in predict.forms(work.op, work.values, work.dtype, machine)}
    return found[name]


def fit(points: list[Point], machine: Machine) -> dict[str, dict[str, float]]:
    """Costs of every kernel, none negative: least squares of the logarithm of predicted over measured, outliers damped, pulled towards PRIOR."""
    groups: dict[str, list[tuple[_base.Form, Work, float]]] = defaultdict(list)
    for work, name, taken in points:
        form = form_for(work, name, machine)
        groups[form.fitted].append((form, work, taken))
    return {key: _fit(group, machine) for key, group in sorted(groups.items())}


def _fit(group: list[tuple[_base.Form, Work, float]], machine: Machine) -> dict[str, float]:
    names = sorted({s.name for form, *_ in group for s in form.formula.seconds.free_symbols} - set(TABLE))
    rows = []
    for form, work, _ in group:
        given = predict.numbers(form, work.values, machine, work.between) | dict.fromkeys(names, 0.0)
        base = compiled(form.formula.seconds)
        fixed = base(given)
        rows.append([base(given | {name: 1.0}) - fixed for name in names] + [fixed])
    counts, taken = np.array(rows), np.array([seconds for *_, seconds in group])
    prior = np.log([PRIOR.get(name, 3.0) for name in names])
    pull = np.array([PULL.get(name, PULL_OTHERS) for name in names])

    def errors(logs: Any) -> Any:
        ratio = np.log((counts[:, :-1] @ np.exp(logs) + counts[:, -1]) / taken)
        return np.concatenate([np.arctan(ratio), pull * (logs - prior)])

    best = min((least_squares(errors, prior + shift, bounds=(-12, 8)) for shift in (0.0, -1.0, 1.0)), key=lambda found: found.cost)
    return {name: float(f"{math.exp(log):.3g}") for name, log in zip(names, best.x, strict=True)}


def judge(points: list[Point], machine: Machine, costs: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Errors by kernel and over all, and Kendall's tau of each layer's forms."""
    errors: dict[str, list[float]] = defaultdict(list)
    sites: dict[Work, list[tuple[float, float]]] = defaultdict(list)
    worst = []
    for work, name, taken in points:
        form = form_for(work, name, machine)
        guessed = predict.seconds(form, work.values, machine, work.between, costs).total
        errors[form.fitted].append(abs(guessed / taken - 1))
        sites[work].append((guessed, taken))
        worst.append((abs(guessed / taken - 1), name, f"{work.op} {dict(work.sizes)} {work.dtype} {work.between >> 20} MB", guessed, taken))
    taus = [kendalltau(*zip(*pairs, strict=True)).statistic for pairs in sites.values() if len(pairs) > 2]
    lost = [taken[int(np.argmin(guessed))] / min(taken) for guessed, taken in (tuple(zip(*pairs, strict=True)) for pairs in sites.values())]
    return {"errors": dict(errors), "tau": taus, "lost": lost, "worst": sorted(worst, reverse=True), "layers": len(sites)}


def show(found: Mapping[str, Any], worst: int) -> None:
    """The table, and what is to be held."""
    table = Table("kernel", "forms", "median %", "mean %", "90th percentile %", title="predicted against measured")
    every = [error for errors in found["errors"].values() for error in errors]
    for key, errors in [*sorted(found["errors"].items()), ("all", every)]:
        table.add_row(key, str(len(errors)), *(f"{100 * value:.1f}" for value in (np.median(errors), np.mean(errors), np.quantile(errors, 0.9))))
    console = Console(width=150)
    console.print(table)
    taus = f"; Kendall's tau within a layer mean {np.mean(found['tau']):.3f}, median {np.median(found['tau']):.3f}" if found["tau"] else ""
    console.print(f"{found['layers']} layers, {len(every)} forms: absolute percentage error median {100 * np.median(every):.1f}, mean "
                  f"{100 * np.mean(every):.1f}, 90th percentile {100 * np.quantile(every, 0.9):.1f}{taus}; the form predicted to be the fastest "
                  f"takes {np.mean(found['lost']):.3f} times as long as the fastest, at the 90th percentile {np.quantile(found['lost'], 0.9):.3f}")
    for error, name, about, guessed, taken in found["worst"][:worst]:
        console.print(f"  {100 * error:.0f} %  {name}: {1e6 * guessed:.1f} µs predicted, {1e6 * taken:.1f} measured; {about}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", type=int, default=90)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--kinds", choices=list(KINDS), default="linears")
    parser.add_argument("--worst", type=int, default=5)
    parser.add_argument("--json", help="also write points and errors to this file")
    options = parser.parse_args()
    if options.fit != (options.seed in FITTING):
        parser.error(f"costs are fitted on seeds {FITTING.start} to {FITTING.stop - 1}, and judged on others")
    works = draw(options.seed, options.points, KINDS[options.kinds])
    if options.build:
        for work in works:
            for form in forms_of(work, host())[0].values():
                form()
        return
    machine, points = machines.measure_host(), measured(works, options.seconds)
    costs = {**_base.fitted(), **(fit(points, machine) if options.fit else {})}     # of what no point has, the costs stay
    found = judge(points, machine, costs)
    show(found, options.worst)
    if options.fit:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(costs[key])}" for key in sorted(set(costs) - set(_base.ASSUMED)))
        _base.COSTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"points": [[work.op, work.sizes, work.dtype, work.between, name, taken] for work, name, taken in points], **found}, file)


if __name__ == "__main__":
    main()
