"""A RepVGG on Fashion-MNIST, collapsed and then thinned out while it is tuned: top-1 beside dense.

    python benchmarks/sparse_repvgg.py [--wider 1] [--densities 0.2 0.1] [--seeds 0] [--epochs 8] [--tuned 8] [--json FILE]

A RepVGG (fashion_mnist.py) is trained for --epochs, collapsed to plain convolutions, and tuned for --tuned epochs more: dense, and under gradual
magnitude pruning of all convolutions and the linear layer (`sc.recipes.gmp`, ERK, cubic, until 60 % of the steps), with one loop for all: half
cross-entropy, half the distillation of the collapsed network, AdamW, one cycle, images mirrored and moved by up to two pixels, bfloat16 autocast.
So "dense, tuned" has had as many steps as the sparse ones. Accuracy is measured on the 10,000 test images, once, at the end, in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import fashion_mnist as fashion
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.training import Hook

BATCH, RATE, TUNING_RATE, EVERY = 128, 3e-3, 2e-3, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--wider", type=int, default=1)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.2, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--tuned", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train, test = fashion.images("train", arguments.data), fashion.images("t10k", arguments.data)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for seed in arguments.seeds:
        for row in measured(arguments, seed, train, test):
            rows.append({"wider": arguments.wider, "seed": seed, "epochs": arguments.epochs, "tuned": arguments.tuned, **row})
            Console(stderr=True).print(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def measured(arguments: argparse.Namespace, seed: int, train: fashion.Images, test: fashion.Images) -> Any:
    """A row of the table, one after the other."""
    torch.manual_seed(seed)
    start = time.process_time()
    network = fashion.repvgg(arguments.wider).train()
    fit(network, None, None, train, seed, arguments.epochs, RATE)
    collapsed = sc.reparameterize(network.eval(), (train.pixels[:2],)).eval()
    yield {"network": "dense", "accuracy": accuracy(collapsed, test), "kept": 1.0, "seconds": time.process_time() - start}
    steps = arguments.tuned * math.ceil(len(train.labels) / BATCH)
    for density in (1.0, *arguments.densities):
        start = time.process_time()
        recipe = sc.recipes.gmp(density, budget="erk", steps=steps * 3 // 5, every=EVERY, targets=("linear", "conv"))
        module, hook = sc.attach(collapsed, (train.pixels[:BATCH],), recipe if density < 1 else Pipeline(()), seed=seed)
        fit(module, hook, collapsed, train, seed + 1, arguments.tuned, TUNING_RATE)
        total = sum(one.numel() for one in module.parameters() if one.dim() > 1)
        kept = 1 - sum(int((~mask).sum()) for mask in hook.masks.values()) / total
        name = f"density {density}" if density < 1 else "dense, tuned"
        yield {"network": name, "accuracy": accuracy(module, test), "kept": kept, "seconds": time.process_time() - start}


def accuracy(network: nn.Module, test: fashion.Images) -> float:
    return fashion.accuracy(fashion.logits(network.eval(), test), test)


def fit(module: nn.Module, hook: Hook | None, teacher: nn.Module | None, data: fashion.Images, seed: int, epochs: int, rate: float) -> None:
    """The plain loop of a user; with a teacher, half of the loss is its distillation."""
    steps = epochs * math.ceil(len(data.labels) / BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.05 if teacher is None else 0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            pixels, labels = varied(data.pixels[chosen], generator), data.labels[chosen]
            with torch.autocast("cpu", torch.bfloat16):
                scores = module(pixels)
                with torch.no_grad():
                    wanted = teacher(pixels) if teacher is not None else None
            loss = functional.cross_entropy(scores.float(), labels, label_smoothing=0.05)
            if wanted is not None:
                target = wanted.float().log_softmax(1)
                loss = loss / 2 + functional.kl_div(scores.float().log_softmax(1), target, log_target=True, reduction="batchmean") / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if hook is not None:
                hook.step(optimizer)


def varied(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, all of a batch moved by up to two pixels."""
    mirrored = torch.rand(len(pixels), generator=generator, dtype=torch.float32) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    down, right = torch.randint(5, (2,), generator=generator).tolist()
    padded = functional.pad(pixels, (2, 2, 2, 2), value=float(pixels.min()))
    return padded[:, :, down : down + 28, right : right + 28].contiguous()


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="RepVGG on Fashion-MNIST: top-1, mean over the seeds (each)")
    for column in ("network", "top-1", "kept", "below dense, tuned", "seconds"):
        table.add_column(column, justify="left" if column == "network" else "right")
    mean: dict[str, float] = {}
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == name]
        mean[name] = sum(row["accuracy"] for row in mine) / len(mine)
        below = f"{100 * (mean['dense, tuned'] - mean[name]):.2f}" if "dense, tuned" in mean else ""
        each = ", ".join(f"{row['accuracy']:.4f}" for row in mine)
        table.add_row(name, f"{mean[name]:.4f} ({each})", f"{mine[0]['kept']:.3f}", below, f"{sum(row['seconds'] for row in mine) / len(mine):.0f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
