"""Methods of sparse training beside each other: accuracy of small networks trained with their zeros, on Fashion-MNIST.

    python benchmarks/sparse_training.py [--models mlp cnn] [--densities 0.1 0.05 0.02] [--seeds 3] [--steps 1000] [--methods ...] [--json FILE]

Every method trains the same network from the same initial weights with the same batches, optimizer (AdamW, one cycle) and number of steps; masks move
every 25 steps until three quarters of them. Settings are the methods' own, the first that were tried. Methods that learn masks of weights which stay
(ON_TRAINED) begin with the network that "dense" of the same seed ends with, and so do one-shot masks, which train nothing. Accuracy is that of the
10,000 test images, measured once, at the end; the table has its mean over the seeds and the spread (largest - smallest). All linear layers and
convolutions are cut.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
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
from sparsify_compiler.training import Hook

BATCH, RATE, SGD, EVERY, LAYERS = 128, 2e-3, 0.1, 25, ("linear", "conv")


def random_masks(budget: str, density: float) -> Pipeline:
    return Pipeline.parse(f"mask_weights(score='random', budget={budget!r}, density={density})")


def sltrain(density: float) -> Pipeline:
    """Half of the numbers are the factors', half the sparse part's."""
    half = density / 2
    return Pipeline.parse(f"add_adapters(adapter='low_rank(share={half})', freeze=False) | mask_weights(score='random', density={half})")


def sparse_ift(form: str, density: float, last: int) -> Pipeline:
    """As many multiplications as the dense network has, whose masks RigL moves, as in the paper."""
    moved = Pipeline.parse(f"move_masks(grow='gradient', decay='cosine(end={last})', every={EVERY}, until={last})")
    return sc.recipes.sparse_ift(density, form) | moved  # type: ignore[arg-type]


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
    "SLTrain": lambda density, last: sltrain(density),
    "Sparse-IFT, wide": lambda density, last: sparse_ift("wide", density, last),
    "Sparse-IFT, parallel": lambda density, last: sparse_ift("parallel", density, last),
    "Sparse-IFT, factorized": lambda density, last: sparse_ift("factorized", density, last),
    "Sparse-IFT, doped": lambda density, last: sparse_ift("doped", density, last),
    "Sparse-IFT, wide, static": lambda density, last: sc.recipes.sparse_ift(density, "wide"),
    "Sparse-IFT, doped, static": lambda density, last: sc.recipes.sparse_ift(density, "doped"),
    "STE 1:8": lambda density, last: sc.recipes.sr_ste("NM(n=1, m=8, padded=True)", penalty=0.0),
    "SR-STE 1:8": lambda density, last: sc.recipes.sr_ste("NM(n=1, m=8, padded=True)"),
    "STE 1:16": lambda density, last: sc.recipes.sr_ste("NM(n=1, m=16, padded=True)", penalty=0.0),
    "SR-STE 1:16": lambda density, last: sc.recipes.sr_ste("NM(n=1, m=16, padded=True)"),
    "mask decay 1:16": lambda density, last: sc.recipes.progressive_gradient_flow(1, 16, "mask", last, last // 10, 5 / last, padded=True),
    "structure decay 1:16": lambda density, last: sc.recipes.progressive_gradient_flow(1, 16, "structure", last, last // 10, padded=True),
    "STE 2:8": lambda density, last: sc.recipes.sr_ste("NM(n=2, m=8, padded=True)", penalty=0.0),
    "BDWP 2:8": lambda density, last: sc.recipes.bdwp(2, 8, padded=True),
    "APP, magnitude": lambda density, last: sc.recipes.app(density, 0.8, 8, last // 7, "magnitude"),
    "APP": lambda density, last: sc.recipes.app(density, 0.8, 8, last // 7),
    "AP": lambda density, last: sc.recipes.activate_while_pruning(density, budget="erk", steps=last, every=EVERY),
    "G2GNet": lambda density, last: sc.recipes.g2gnet(density, 4, steps=last, every=EVERY),
    "G2GNet, random growth": lambda density, last: sc.recipes.g2gnet(density, 4, steps=last, every=EVERY, grow="random"),
    "HyperSparse (ART)": lambda density, last: sc.recipes.hyper_sparse(density, steps=last, dense=last // 5),
    "L1 (ART)": lambda density, last: sc.recipes.hyper_sparse(density, steps=last, dense=last // 5, loss="l1"),
    "no loss, cut at the same step": lambda density, last: sc.recipes.hyper_sparse(density, steps=last, dense=last // 5, weight=0.0),
    "WGSEF, 16x1": lambda density, last: sc.recipes.wgsef(density, "16x1", steps=last),
    "no step, 16x1 cut at the same step": lambda density, last: sc.recipes.wgsef(density, "16x1", steps=last, strength=0.0),
    "one shot, magnitude": lambda density, last: sc.recipes.magnitude(density=density),
    "Lottery Jackpots": lambda density, last: sc.recipes.lottery_jackpots(density, steps=last),
    "Lottery Jackpots, all changes": lambda density, last: sc.recipes.lottery_jackpots(density, steps=last, power=0.0),
    "Lottery Jackpots, SGD": lambda density, last: sc.recipes.lottery_jackpots(density, steps=last),
    "one shot, magnitude, 1:4": lambda density, last: sc.recipes.magnitude("1:4"),
    "Lottery Jackpots 1:4": lambda density, last: sc.recipes.lottery_jackpots(structure="1:4", steps=last),
    "MaskLLM 1:4": lambda density, last: sc.recipes.mask_llm("1:4", "magnitude", last, reward=0.0),
    "MaskLLM 1:4, reward": lambda density, last: sc.recipes.mask_llm("1:4", "magnitude", last, reward=1e-4),
    "MaskLLM 1:4, no prior": lambda density, last: sc.recipes.mask_llm("1:4", "magnitude", last, prior=0.0, reward=0.0),
}
ON_TRAINED = [name for name in METHODS if name.startswith(("one shot", "Lottery", "MaskLLM"))]
OF_ITS_OWN = [name for name in METHODS if name == "dense" or ":" in name]  # whose density is not asked for


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
                rows.append(about | accuracy(model, method, density, train, test, seed, arguments.steps))
                Console(stderr=True).print(rows[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def accuracy(model: str, method: str, density: float, train: fashion.Images, test: fashion.Images, seed: int, steps: int) -> dict[str, float]:
    """Accuracy on the test images after training, and the share of the weights that is kept then."""
    stays = method in ON_TRAINED
    network = trained(model, seed, steps, train) if stays else fresh(model, seed)
    pipeline = METHODS[method](density, steps * 3 // 4)
    every = LAYERS if model == "cnn" else ("linear",)
    pipeline = Pipeline(tuple(type(one)(**{**one.options(), "targets": every}) if one.name() == "mask_weights" else one for one in pipeline.passes))
    module, hook = sc.attach(network, (train.pixels[:BATCH],), pipeline, seed=seed)
    if not method.startswith("one shot"):
        fit(module, hook, train, seed, steps, 0.0 if stays else 1e-2, SGD if "SGD" in method else 0.0)
    kept = [int(mask.sum()) for mask in hook.masks.values()]
    weights = [mask.numel() for mask in hook.masks.values()]
    low = sum(one.numel() for name, one in module.named_parameters() if "low_rank" in name)
    dense = sum(one.numel() for one in network.parameters() if one.dim() > 1)
    return {"accuracy": fashion.accuracy(fashion.logits(module, test), test), "kept": (sum(kept) + low) / dense if weights else 1.0}


def fresh(model: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[model]().eval()


@cache
def trained(model: str, seed: int, steps: int, train: fashion.Images) -> nn.Module:
    """What "dense" ends with."""
    network = fresh(model, seed)
    module, hook = sc.attach(network, (train.pixels[:BATCH],), Pipeline(()), seed=seed)
    fit(module, hook, train, seed, steps, 1e-2)
    network.load_state_dict(module.state_dict())
    return network


def fit(module: nn.Module, hook: Hook, train: fashion.Images, seed: int, steps: int, decay: float, sgd: float = 0.0) -> None:
    """With AdamW, or with SGD at this rate, momentum .9."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, sgd, 0.9) if sgd else torch.optim.AdamW(parameters, RATE, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sgd or RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(train.labels), (BATCH,), generator=generator)
        loss = functional.cross_entropy(module(train.pixels[chosen]), train.labels[chosen]) + hook.loss()
        loss.backward()
        optimizer.step()
        schedule.step()
        hook.step(optimizer)
        optimizer.zero_grad()


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
