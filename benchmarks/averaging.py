"""Pruned, trained, averaged: accuracy of a small network on Fashion-MNIST by how many particles are averaged in every cycle.

    python benchmarks/averaging.py [--densities 0.2 0.05 0.02] [--seeds 3] [--steps 200] [--base 400] [--json FILE]

LeNet-300-100 is trained for --base steps; then a cycle for each density prunes all layers by magnitude to it and trains for --steps, with momentum
and one cycle of the rate. IMP is one particle; IMP x3 one that trains for three times as long, as much work as three particles; soups average three
(the greedy one those that help on 10,000 training images, which none trains on); SWAMP rewinds its particles to the weights of step 50 of the base,
and so does rewound IMP. Particles differ in the order of their batches. Accuracy is that of the 10,000 test images after the last cycle, of the
average and of the first particle that is in it.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import fashion_mnist as fashion
import torch
from rich.console import Console
from rich.table import Table
from sparse_training import mlp
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.training import Hook

BATCH, RATE, EARLY, HELD = 128, 0.1, 50, 10_000
CASES: dict[str, dict[str, Any]] = {
    "IMP": {"particles": 1},
    "IMP x3": {"particles": 1, "longer": 3},
    "soup of 3": {"particles": 3},
    "greedy soup of 3": {"particles": 3, "greedy": True},
    "IMP, rewound": {"particles": 1, "rewound": True},
    "SWAMP of 3": {"particles": 3, "rewound": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.05, 0.02])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    everything, test = fashion.images("train", arguments.data), fashion.images("t10k", arguments.data)
    train, held = (fashion.Images(everything.pixels[rows], everything.labels[rows]) for rows in (slice(HELD, None), slice(HELD)))
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        network = mlp().eval()
        module, hook = sc.attach(network, (train.pixels[:BATCH],), sc.Pipeline(()))
        early = tune(train, EARLY, seed, module, hook, 0, arguments.base)
        network.load_state_dict(tune(train, arguments.base - EARLY, seed + 100, module, hook, 0, arguments.base))
        for case in arguments.cases:
            about = {"case": case, "seed": seed, "densities": arguments.densities, "steps": arguments.steps, "base": arguments.base}
            if not any(about.items() <= row.items() for row in rows):
                rows.append(about | measured(network, case, early, train, held, test, arguments, seed))
                Console(stderr=True).print(rows[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def measured(network: nn.Module, case: str, early: dict[str, Tensor], train: fashion.Images, held: fashion.Images, test: fashion.Images,
             arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    options, firsts = CASES[case], []

    def particle(module: nn.Module, hook: Hook, number: int) -> None:
        tune(train, arguments.steps * options.get("longer", 1), 10 * seed + number, module, hook)
        if number == 0:
            firsts.append(fashion.accuracy(fashion.logits(module, test), test))

    masks = [sc.recipes.magnitude(density=density) for density in arguments.densities]
    metric = (lambda module: fashion.accuracy(fashion.logits(module, held), held)) if options.get("greedy") else None
    module, _ = sc.averaged_cycles(network, (train.pixels[:BATCH],), masks, particle, particles=options["particles"], metric=metric,
                                   rewind=early if options.get("rewound") else None)
    return {"accuracy": fashion.accuracy(fashion.logits(module, test), test), "particle": firsts[-1]}


def tune(data: fashion.Images, steps: int, seed: int, module: nn.Module, hook: Hook, number: int = 0, total: int | None = None) -> dict[str, Tensor]:
    """A user's loop; the state of the module after it. total: of a rate that stays what it is at its middle; else one cycle of it."""
    optimizer = torch.optim.SGD(module.parameters(), RATE / 2, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = None if total else torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (BATCH,), generator=generator)
        functional.cross_entropy(module(data.pixels[chosen]), data.labels[chosen]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Cycles of {rows[0]['densities']}: accuracy, mean over the seeds ± half the spread")
    for column in ("case", "averaged", "its first particle"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in dict.fromkeys(row["case"] for row in rows):
        each = partial(cell, [row for row in rows if row["case"] == case])
        table.add_row(case, each("accuracy"), each("particle"))
    Console(width=130).print(table)


def cell(rows: list[dict[str, Any]], key: str) -> str:
    found = [row[key] for row in rows]
    return f"{sum(found) / len(found):.4f} ± {(max(found) - min(found)) / 2:.4f}"


if __name__ == "__main__":
    main()
