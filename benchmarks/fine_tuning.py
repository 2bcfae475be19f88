"""Fine-tuning with little: forward passes alone (Sparse-MeZO), and a few blocks' adapters in each step (IST), on turned images.

    python benchmarks/fine_tuning.py [--only zeroth,blocks] [--seeds 3] [--json FILE]

Networks are trained on Fashion-MNIST's 60,000 images, and fine-tuned on the same ones turned by a quarter; accuracy is that of the 10,000 turned
test images, measured once, at the end; of "before", without fine-tuning.

zeroth  LeNet-300-100 after 600 steps of AdamW: --steps steps of sc.ZerothOrder at 128 images, on all weights (MeZO) and on the smallest half and
        quarter of each matrix (Sparse-MeZO), with the rates of RATES; and as many steps of SGD with the gradient, the bound
blocks  the small ViT of fashion_mnist.py (4 blocks), LoRA of rank 4 in all linear layers of the blocks, AdamW at 2e-3: all four blocks in every step,
        and two of four, chosen by the importance that is learnt (sc.LayerChoice) or at random (the same with a rate of 0)
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import fashion_mnist as fashion
import platformdirs
import sparse_training
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError

BATCH, RATES = 128, (1e-4, 3e-4)
SHARES = {"MeZO, all weights": 1.0, "Sparse-MeZO, smallest half": 0.5, "Sparse-MeZO, smallest quarter": 0.25}
CHOSEN = {"all blocks": None, "two of four, learnt (IST)": 10.0, "two of four, at random": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--only", default="zeroth,blocks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tuned", type=int, default=150)
    parser.add_argument("--base", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    train, test = fashion.images("train", arguments.data), fashion.images("t10k", arguments.data)
    turned = fashion.Images(torch.rot90(train.pixels, 1, (2, 3)).contiguous(), train.labels)
    measured = fashion.Images(torch.rot90(test.pixels, 1, (2, 3)).contiguous(), test.labels)
    rows: list[dict[str, Any]] = []
    for part in arguments.only.split(","):
        for row in {"zeroth": zeroth, "blocks": blocks}[part](arguments, train, turned, measured):
            rows.append(row)
            Console(stderr=True).print(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def zeroth(arguments: argparse.Namespace, train: fashion.Images, turned: fashion.Images, test: fashion.Images) -> Any:
    for seed in range(arguments.seeds):
        base = sparse_training.trained("mlp", seed, 600, train)
        yield {"method": "LeNet, before", "accuracy": accuracy(base, test)}
        for name, share in SHARES.items():
            for rate in RATES:
                network = copy.deepcopy(base)
                optimizer = sc.ZerothOrder(network.parameters(), rate, 1e-3, share, seed=seed)
                generator = torch.Generator().manual_seed(seed)
                with suppress(InputError):  # a rate at which the loss ends at no number: the accuracy is what is left then
                    for _ in range(arguments.steps):
                        batch = drawn(turned, generator)
                        optimizer.step(lambda network=network, batch=batch: loss(network, batch))
                yield {"method": f"{name}, rate {rate:g}", "accuracy": accuracy(network, test)}
        network = copy.deepcopy(base)
        sgd, generator = torch.optim.SGD(network.parameters(), 3e-2), torch.Generator().manual_seed(seed)
        for _ in range(arguments.steps):
            loss(network, drawn(turned, generator)).backward()
            sgd.step()
            sgd.zero_grad()
        yield {"method": "SGD, rate 0.03", "accuracy": accuracy(network, test)}


def blocks(arguments: argparse.Namespace, train: fashion.Images, turned: fashion.Images, test: fashion.Images) -> Any:
    cache = Path(platformdirs.user_cache_dir("sparsify_compiler")) / "models"
    base = fashion.trained("vit", train, arguments.base, cache, Console(stderr=True).print)
    yield {"method": "ViT, before", "accuracy": accuracy(base, test)}
    for seed in range(arguments.seeds):
        for name, learning in CHOSEN.items():
            module, hook = sc.attach(base, (train.pixels[:BATCH],), sc.recipes.lora(4, targets=("blocks.*",)), seed=seed)
            trained = [one for one in module.parameters() if one.requires_grad]
            optimizer, generator = torch.optim.AdamW(trained, 2e-3), torch.Generator().manual_seed(seed)
            choice = None if learning is None else sc.LayerChoice(module, hook, len(hook.blocks) // 2, every=5, rate=learning, seed=seed)
            for _ in range(arguments.tuned):
                batch = drawn(turned, generator)
                loss(module, batch).backward()
                optimizer.step(), hook.step(optimizer), optimizer.zero_grad()
                if choice is not None:
                    choice.step(lambda module=module, batch=batch: loss(module, batch))
            yield {"method": name.replace("two of four", f"{len(hook.blocks) // 2} of {len(hook.blocks)}"), "accuracy": accuracy(module, test)}


def drawn(data: fashion.Images, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(data.labels), (BATCH,), generator=generator)
    return data.pixels[chosen], data.labels[chosen]


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(network(batch[0]), batch[1])


def accuracy(network: nn.Module, test: fashion.Images) -> float:
    return fashion.accuracy(fashion.logits(network, test), test)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Fine-tuned on turned images: accuracy, mean over the seeds ± half the spread")
    table.add_column("method")
    table.add_column("accuracy", justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row["accuracy"] for row in rows if row["method"] == method]
        table.add_row(method, f"{sum(found) / len(found):.4f} ± {(max(found) - min(found)) / 2:.4f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
