"""What training makes of activation sparsity: density of the FFNs' neurons and accuracy, before and after fine-tuning with each recipe.

    python benchmarks/train_sparse.py [--recipes prosparse ...] [--base 6] [--epochs 3] [--images 60000] [--json FILE]

A small ViT (fashion_mnist.py: 4 blocks of width 48, FFNs of 192 neurons) is trained with GELU on Fashion-MNIST for --base epochs; then each recipe
is attached to it and it is fine-tuned for --epochs over the first --images with the same loop, optimizer and learning rate, "gelu" without a recipe
among them. "before" is after the rewrite and before any step. Density is the share of neurons that are not zero, over all FFNs and test images.
Settings are those of RECIPES, the first that were tried; accuracy is measured on the 10,000 test images, once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fashion_mnist as fashion
import platformdirs
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler import recipes
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.training import Hook

BATCH, RATE = 128, 1e-3
RECIPES: dict[str, Callable[[int], Pipeline]] = {  # of the number of steps
    "gelu": lambda steps: Pipeline(()),
    "relu": lambda steps: Pipeline.parse("replace_activation(to='relu')"),
    "relu2_wins": lambda steps: recipes.relu2_wins(),
    "shifted_relu": lambda steps: Pipeline.parse("replace_activation(to='shifted_relu(shift=0.5)')"),
    "fatrelu 0.1": lambda steps: Pipeline.parse("replace_activation(to='fatrelu(threshold=0.1)')"),
    "star_relu": lambda steps: Pipeline.parse("replace_activation(to='star_relu')"),
    "prosparse": lambda steps: recipes.prosparse(1.0, 0.01, (steps // 10, steps // 2, steps * 9 // 10)),
    "prosparse x3": lambda steps: recipes.prosparse(3.0, 0.01, (steps // 10, steps // 2, steps * 9 // 10)),
    "relu + deft": lambda steps: Pipeline.parse("replace_activation(to='relu')") | recipes.deft(0.3),
    "relu + deft x3": lambda steps: Pipeline.parse("replace_activation(to='relu')") | recipes.deft(1.0),
    "relu + lazy_neuron 10 %": lambda steps: Pipeline.parse("replace_activation(to='relu')") | recipes.lazy_neuron(0.1),
    "relu2 + q_sparse 40 %": lambda steps: recipes.relu2_wins() | recipes.q_sparse(0.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--base", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train, test = fashion.images("train", arguments.data), fashion.images("t10k", arguments.data)
    few = fashion.Images(train.pixels[: arguments.images], train.labels[: arguments.images])
    say = Console(stderr=True).print
    base = fashion.trained("vit", train, arguments.base, Path(platformdirs.user_cache_dir("sparsify_compiler")) / "models", say)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for name in arguments.recipes:
        if not any(row["recipe"] == name for row in rows):
            rows.append({"recipe": name, **measured(base, name, few, test, arguments.epochs)})
            say(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))
    show(rows)


def measured(base: nn.Module, name: str, train: fashion.Images, test: fashion.Images, epochs: int) -> dict[str, Any]:
    """Accuracy and density before and after, and seconds of processor of the training."""
    steps = epochs * math.ceil(len(train.labels) / BATCH)
    calibration = [(train.pixels[i : i + BATCH],) for i in range(0, 4 * BATCH, BATCH)]
    module, hook = sc.attach(base, (train.pixels[:BATCH],), RECIPES[name](steps), calibration=calibration, dynamic={0: {0: "batch"}})
    before, spent = quality(module, hook, test), time.process_time()
    tune(module, hook, train, epochs, steps)
    after = quality(module, hook, test)
    return {"accuracy before": before[0], "accuracy": after[0], "density before": before[1], "density": after[1],
            "seconds": time.process_time() - spent}


def tune(module: nn.Module, hook: Hook, data: fashion.Images, epochs: int, steps: int) -> None:
    """The plain loop of a user."""
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    module.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            loss = functional.cross_entropy(module(data.pixels[chosen]), data.labels[chosen], label_smoothing=0.05) + hook.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            hook.step()
    module.eval()


def quality(module: nn.Module, hook: Hook, data: fashion.Images) -> tuple[float, float]:
    """Accuracy, and the mean density of the FFNs' neurons."""
    right, densities = 0, []
    with torch.no_grad():
        for pixels, labels in zip(data.pixels.split(500), data.labels.split(500), strict=True):
            right += int((module(pixels).argmax(1) == labels).sum())
            found = hook.densities()
            densities.append(sum(found.values()) / len(found))
    return right / len(data.labels), sum(densities) / len(densities)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="ViT on Fashion-MNIST, fine-tuned with a recipe")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in rows:
        table.add_row(*(f"{value:.0f}" if key == "seconds" else f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
