"""Methods of sparse training beside each other: accuracy of small networks trained with their zeros, on Fashion-MNIST.

    python benchmarks/sparse_training.py [--models mlp cnn] [--densities 0.1 0.05 0.02] [--seeds 3] [--steps 1000] [--methods ...] [--json FILE]

Every method trains the same network from the same initial weights with the same batches, optimizer (AdamW, one cycle) and number of steps; masks move
every 25 steps until three quarters of them. Settings are the methods' own, the first that were tried. Accuracy is that of the 10,000 test images,
measured once, at the end; the table has its mean over the seeds and the spread (largest - smallest). All linear layers and convolutions are cut.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fashion_mnist as fashion
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.pipeline import Pipeline

BATCH, RATE, EVERY, LAYERS = 128, 2e-3, 25, ("linear", "conv")


def random_masks(budget: str, density: float) -> Pipeline:
    return Pipeline.parse(f"mask_weights(score='random', budget={budget!r}, density={density})")


METHODS: dict[str, Callable[[float, int], Pipeline]] = {  # of density and the step of the last update
    "dense": lambda density, last: Pipeline(()),
    "static random, uniform": lambda density, last: random_masks("uniform", density),
    "static random, ERK": lambda density, last: random_masks("erk", density),
    "SET": lambda density, last: sc.recipes.sparse_evolutionary(density, steps=last, every=EVERY),
    "RigL, uniform": lambda density, last: sc.recipes.rigl(density, "uniform", steps=last, every=EVERY),
    "RigL": lambda density, last: sc.recipes.rigl(density, steps=last, every=EVERY),
    "sparse momentum": lambda density, last: sc.recipes.sparse_momentum(density, "erk", steps=last, every=EVERY),
    "SRigL": lambda density, last: sc.recipes.srigl(density, steps=last, every=EVERY),
    "GraNet": lambda density, last: sc.recipes.granet(density, steps=last, every=EVERY),
    "GMP": lambda density, last: sc.recipes.gmp(density, budget="erk", steps=last, every=EVERY),
    "STE 1:8": lambda density, last: sc.recipes.sr_ste("NM(n=1, m=8, padded=True)", penalty=0.0),
    "SR-STE 1:8": lambda density, last: sc.recipes.sr_ste("NM(n=1, m=8, padded=True)"),
}
OF_ITS_OWN = ("dense", "STE 1:8", "SR-STE 1:8")  # whose density is not asked for


def mlp() -> nn.Module:
    """LeNet-300-100."""
    layers = (nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    """Three convolutions, two of which halve the image, and two linear layers."""
    convolutions = (nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS = {"mlp": mlp, "cnn": cnn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.05, 0.02])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train, test = fashion.images("train", arguments.data), fashion.images("t10k", arguments.data)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for seed in range(arguments.seeds):
        for model, density, method in ((m, d, name) for m in arguments.models for d in arguments.densities for name in arguments.methods):
            about = {"model": model, "density": None if method in OF_ITS_OWN else density, "method": method, "seed": seed, "steps": arguments.steps}
            if not any(about.items() <= row.items() for row in rows):
                rows.append(about | accuracy(model, METHODS[method](density, arguments.steps * 3 // 4), train, test, seed, arguments.steps))
                Console(stderr=True).print(rows[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def accuracy(model: str, pipeline: Pipeline, train: fashion.Images, test: fashion.Images, seed: int, steps: int) -> dict[str, float]:
    """Accuracy on the test images after training, and the share of the weights that is kept then."""
    torch.manual_seed(seed)
    network = MODELS[model]().eval()
    masked, *rest = pipeline.passes or (None,)
    if masked is not None:
        pipeline = Pipeline((type(masked)(**{**masked.options(), "targets": LAYERS if model == "cnn" else ("linear",)}), *rest))
    module, hook = sc.attach(network, (train.pixels[:BATCH],), pipeline, seed=seed)
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(train.labels), (BATCH,), generator=generator)
        loss = functional.cross_entropy(module(train.pixels[chosen]), train.labels[chosen]) + hook.loss()
        loss.backward()
        optimizer.step()
        schedule.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    kept = [int(mask.sum()) for mask in hook.masks.values()]
    weights = [mask.numel() for mask in hook.masks.values()]
    return {"accuracy": fashion.accuracy(fashion.logits(module, test), test), "kept": sum(kept) / sum(weights) if weights else 1.0}


def show(rows: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        densities = sorted({row["density"] for row in mine if row["density"]}, reverse=True)
        table = Table(title=f"{model}: accuracy, mean over the seeds ± half the spread")
        for column in ("method", *(f"density {density}" for density in densities)):
            table.add_column(column, justify="left" if column == "method" else "right")
        for method in dict.fromkeys(row["method"] for row in mine):
            table.add_row(method, *(cell(mine, method, density) for density in densities))
        Console(width=130).print(table)


def cell(rows: list[dict[str, Any]], method: str, density: float) -> str:
    found = [row["accuracy"] for row in rows if row["method"] == method and row["density"] in (density, None)]
    return f"{sum(found) / len(found):.4f} ± {(max(found) - min(found)) / 2:.4f}" if found else ""


if __name__ == "__main__":
    main()
