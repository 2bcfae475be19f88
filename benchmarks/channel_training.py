"""Training that leaves channels out, beside cutting them and training on: accuracy on Fashion-MNIST at equal multiplications, in equal steps.

    python benchmarks/channel_training.py [--steps 400] [--seeds 3] [--json FILE]

A RepVGG of benchmarks/fashion_mnist.py is trained and collapsed to six convolutions and a linear layer ("before"). All others begin there, and
train as many steps again, with the same batches and the same optimizer: AdamW, one cycle.

    dense          everything trains on
    static         remove_channels() takes the filters of least magnitude out at once
    pat            gate_channels() and learn_masks(chooser="sigmoid"): a mask over the filters of each layer is learnt while the weights train,
                   what is shut is cut at the end
    ftwt           predict_filters(): each image gets filters of its own

Multiplications are those of the convolutions for an image: of what is left, or of the filters that are kept, which read those that the layer before
has kept, with the predictors' own; a mean over 1000 test images. Accuracy is that of the 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fashion_mnist as fashion
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.program import Program

BATCH, RATE = 128, 2e-3
CONV, WHERE = torch.ops.aten.conv2d.default, torch.ops.aten.where.self
# the share of filters, or of the maps
CASES = (("static", 0.5), ("ftwt", 0.9), ("dense", 1.0), ("pat", 0.5), ("ftwt", 0.7), ("static", 0.7), ("pat", 0.7), ("ftwt", 0.98))


def pat(density: float, steps: int) -> str:
    return f"gate_channels(density={density}) | learn_masks(chooser='sigmoid', until={steps * 3 // 4}, of='gates', freeze=False)"


def train(module: nn.Module, hook: Any, data: fashion.Images, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (BATCH,), generator=generator)
        loss = functional.cross_entropy(module(data.pixels[chosen]), data.labels[chosen])
        (loss if hook is None else loss + hook.loss()).backward()
        optimizer.step()
        if hook is not None:
            hook.step(optimizer)
        optimizer.zero_grad()
        schedule.step()


class Count(fx.Interpreter):
    """Multiplications of the convolutions, as a mean over the images of a call."""

    def __init__(self, program: Program) -> None:
        (region,) = program.regions.values()
        super().__init__(region.module, graph=region.graph)
        self.total, self._kept = 0.0, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        sources = [self._kept[source.name] for source in n.all_input_nodes if source.name in self._kept]
        if n.target is CONV:
            weight = self.fetch_attr(str(n.kwargs["weight"].target))  # type: ignore[union-attr]
            chosen = next((user for user in n.users if user.target is WHERE), None)
            images = len(value)
            self._pending = (sources[0] if sources else torch.ones(images, weight.shape[1])), weight, value[0, 0].numel()
            if chosen is None:
                self._add(torch.ones(images, len(weight)), 0)
            self._kept[n.name] = torch.ones(images, len(weight))
        elif n.target is WHERE and any(source.target is CONV for source in n.all_input_nodes):
            kept = (value.flatten(2) != 0).any(2).float()
            self._add(kept, self._pending[1].shape[0] * self._pending[1].shape[1])
            self._kept[n.name] = kept
        elif sources and isinstance(value, Tensor) and value.dim() == 4:
            self._kept[n.name] = sources[0]
        return value

    def _add(self, kept: Tensor, extra: int) -> None:
        given, weight, places = self._pending
        self.total += float((kept.sum(1) * given.sum(1)).double().mean()) * weight[0, 0].numel() * places + extra


def measured(module: nn.Module, data: fashion.Images) -> tuple[float, float]:
    """Accuracy in percent, and million multiplications an image."""
    module.eval()
    scores = fashion.logits(module, data)
    count = Count(sc.capture(module, (data.pixels[:1000],)))
    with torch.no_grad():
        count.run(data.pixels[:1000])
    return 100 * fashion.accuracy(scores, data), count.total / 1e6


def ended(module: nn.Module, data: fashion.Images) -> nn.Module:
    """With what is shut taken out."""
    return instantiate(sc.Pipeline.parse("drop_dead_channels() | fold_scale()").run(sc.capture(module.eval(), (data.pixels[:2],))))


def run(method: str, share: float, dense: nn.Module, train_set: fashion.Images, test: fashion.Images, steps: int, seed: int) -> tuple[float, float]:
    recipes: dict[str, Any] = {"static": lambda: f"remove_channels(score='magnitude', density={share})", "pat": lambda: pat(share, steps),
                               "ftwt": lambda: sc.recipes.ftwt(share), "dense": lambda: sc.Pipeline(())}
    module, hook = sc.attach(dense, (train_set.pixels[:BATCH],), recipes[method]())
    train(module, hook, train_set, steps, seed)
    return measured(ended(module, test) if method == "pat" else module, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    train_set, test = fashion.images("train"), fashion.images("t10k")
    found: dict[str, list[tuple[float, float]]] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = fashion.repvgg()
        if all(len(found.get(f"{method} {share}", ())) > seed for method, share in CASES):
            continue
        model.train()
        train(model, None, train_set, args.steps, seed)
        dense = sc.reparameterize(model.eval(), (train_set.pixels[:2],))
        for method, share in (("before", 1.0), *CASES):
            rows = found.setdefault(f"{method} {share}", [])
            if len(rows) <= seed:
                rows.append(measured(dense, test) if method == "before" else run(method, share, dense, train_set, test, args.steps, seed + 100))
                if args.json:
                    args.json.write_text(json.dumps(found))
    table = Table("method", "accuracy %", "spread", "million multiplications")
    for name, rows in found.items():
        hits, work = zip(*rows, strict=True)
        table.add_row(name, f"{sum(hits) / len(hits):.2f}", f"{max(hits) - min(hits):.2f}", f"{sum(work) / len(work):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
