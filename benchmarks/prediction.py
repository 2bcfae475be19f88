"""How well the time of a layer is predicted, for layers drawn by a seed; and how the costs of kernels are found, on layers of other seeds.

    python benchmarks/prediction.py --build && python benchmarks/prediction.py [--seed 1] [--points 150] [--json FILE]
    python benchmarks/prediction.py --kinds linears         # or others: torch's elementwise ops, norms, convolutions, attention; or kernels
    python benchmarks/prediction.py --kinds linears others kernels --fit --seed 100 101 [--more FILE]    # writes cost_models/costs/PROCESSOR.json

A point is a layer (op, sizes, density, rows, dtype, how much other memory is read between two calls) with all of its forms, dense ones included,
each timed as `sparsify_compiler.work.measure` does. Errors are |predicted / measured - 1|; Kendall's tau is that of the order of a point's forms.
This machine is measured first (`sparsify targets --measure`): what its memory gives changes with what its neighbours do, within minutes. A fit
takes what earlier runs wrote with --json, too, each with the machine as it was then.
--build only builds the kernels, which takes minutes where they are not in the cache; run the rest on an otherwise idle machine, with
--seconds to stop early: what was measured is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from sparsify_compiler import machines
from sparsify_compiler.cost_models import predict, shipped
from sparsify_compiler.cost_models.fit import Timed, fit
from sparsify_compiler.cost_models.machine import Machine
from sparsify_compiler.machine_costs import PULL, timed, timed_forms
from sparsify_compiler.target import host
from sparsify_compiler.work import Work
from sparsify_compiler.work_draw import FITTING, KINDS, draw
from sparsify_compiler.work_sample import forms_of


def measured(works: Iterable[Work], seconds: float, machine: Machine) -> list[tuple[Work, Timed]]:
    """Every form of these layers, until so many seconds have passed."""
    end, points = time.monotonic() + seconds, []
    for work in works:
        if time.monotonic() > end:
            break
        points += [(work, point) for point in timed_forms(work, machine)]
    return points


def earlier(path: str) -> list[tuple[Work, Timed]]:
    """What --json wrote: forms that there still are, with the machine as it was."""
    kept = json.loads(Path(path).read_text(encoding="utf-8"))
    layers: dict[Work, dict[str, float]] = defaultdict(dict)
    machine = Machine.from_json(kept["machine"])
    for op, sizes, dtype, between, name, seconds in kept["points"]:
        layers[Work.make(op, dtype, between, **dict(sizes))][name] = seconds
    return [(work, point) for work, forms in layers.items() for point in timed(work, forms, machine, own=True)]


def judge(points: list[tuple[Work, Timed]], machine: Machine) -> dict[str, Any]:
    """Errors by kernel and over all, and Kendall's tau of each layer's forms."""
    errors: dict[str, list[float]] = defaultdict(list)
    sites: dict[Work, list[tuple[float, float]]] = defaultdict(list)
    worst = []
    for work, point in points:
        here = machine if point.machine is None else replace(point.machine, costs=machine.costs)
        guessed, taken = predict.seconds(point.form, point.values, here, point.between, point.again).total, point.seconds
        errors[point.form.fitted].append(abs(guessed / taken - 1))
        sites[work].append((guessed, taken))
        about = f"{work.op} {dict(work.sizes)} {work.dtype} {work.between >> 20} MB"
        worst.append((abs(guessed / taken - 1), point.form.name, about, guessed, taken))
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
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--points", type=int, default=150, help="layers of each kind and seed")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=["all"])
    parser.add_argument("--more", nargs="+", default=[], metavar="FILE", help="with --fit: what --json wrote earlier")
    parser.add_argument("--worst", type=int, default=5)
    parser.add_argument("--json", help="also write points and errors to this file")
    options = parser.parse_args()
    if any(options.fit != (seed in FITTING) for seed in options.seed):
        parser.error(f"costs are fitted on seeds {FITTING.start} to {FITTING.stop - 1}, and judged on others")
    works = list(dict.fromkeys(work for seed in options.seed for kinds in options.kinds for work in draw(seed, options.points, KINDS[kinds])))
    if options.build:
        for work in works:
            for form in forms_of(work, host())[0].values():
                form()
        return
    machine = replace(machines.measure_host(), costs={})     # not those that were fitted here by `sparsify targets --fit`, if any were
    points = measured(works, options.seconds, machine)
    if options.fit:
        points += [point for path in options.more for point in earlier(path)]
        machine = replace(machine, costs=fit([point for _, point in points], machine, shipped.costs_of(machine.arch, machine.features), PULL))
        write(machine, options.seed)
    found = judge(points, machine)
    show(found, options.worst)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            timed = [[work.op, work.sizes, work.dtype, work.between, point.form.name, point.seconds] for work, point in points
                     if point.machine is None]      # those of --more are kept where they were, with their machines
            json.dump({"machine": machine.to_json(), "points": timed, **found}, file)


def write(machine: Machine, seeds: list[int]) -> None:
    """Costs of this kind of processor, as they are shipped; of kernels that no point was of, they stay."""
    file = shipped.file_of(host().mcpu)
    kept = json.loads(file.read_text(encoding="utf-8"))["costs"] if file.exists() else {}
    costs = {**kept, **machine.costs}
    about = {"about": f"{machine.title}, seeds {seeds} of benchmarks/prediction.py", "arch": machine.arch, "features": list(machine.features)}
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(costs[key])}" for key in sorted(costs))
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    file.write_text(f'{{\n{head}  "costs": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
