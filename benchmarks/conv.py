"""Convolutional networks: compiled against every dense form, interleaved in one process.

    python benchmarks/conv.py [--json FILE] [--size 224] [--batch 1 8] [--only lite]

Three networks, their norms folded as an exact reparameterisation leaves them, weights random (speed does not depend on them):

    lite      EfficientNet-Lite0's plan: inverted residuals, depthwise 3×3 and 5×5, relu6
    swish     the same with gates (squeeze and excite) and silu, as EfficientNet-B0 has them
    plain     RepVGG-A0's plan: a chain of 3×3 convolutions and relu

Rows: eager; eager with model and input channels last; torch.compile with frozen weights; compiled by us, which lowers and prunes nothing. Times are
medians in milliseconds with quartiles, ratios are this form / compiled: above 1 the compiled model is faster. The last line is what calling one
convolution with its relu costs, where there is next to nothing to compute.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.measure import interleave
from sparsify_compiler.yardstick import dense_forms

COMPILED = "compiled"
# Expansion, channels, layers, stride, kernel of each stage (EfficientNet, arXiv:1905.11946, table 1).
EFFICIENT = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
# Channels and layers of each stage (RepVGG, arXiv:2101.03697, tables 2 and 3: A0).
REPVGG = ((48, 1), (48, 2), (96, 4), (192, 14), (1280, 1))


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(nn.functional.silu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """Expand, depthwise, gate, project; plus x where the shape is kept."""

    def __init__(self, before: int, after: int, expansion: int, stride: int, kernel: int, gated: bool) -> None:
        super().__init__()
        activation, wide = nn.SiLU if gated else nn.ReLU6, before * expansion
        layers: list[nn.Module] = [nn.Conv2d(before, wide, 1), activation()] if expansion > 1 else []
        layers += [nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide), activation()]
        layers += [Gate(wide, max(1, before // 4))] if gated else []
        self.body, self.adds = nn.Sequential(*layers, nn.Conv2d(wide, after, 1)), stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def efficient(gated: bool) -> nn.Module:
    """EfficientNet-B0, or with gated=False EfficientNet-Lite0."""
    activation, channels = nn.SiLU if gated else nn.ReLU6, 32
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1), activation()]
    for expansion, width, depth, stride, kernel in EFFICIENT:
        for index in range(depth):
            layers.append(InvertedResidual(channels, width, expansion, stride if index == 0 else 1, kernel, gated))
            channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 1280, 1), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def plain() -> nn.Module:
    """RepVGG-A0 as it is deployed."""
    layers, channels = [], 3
    for width, depth in REPVGG:
        for index in range(depth):
            layers += [nn.Conv2d(channels, width, 3, 2 if index == 0 else 1, 1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lite": lambda: efficient(False), "swish": lambda: efficient(True), "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    found = {f"{name}, batch {batch}": measure(name, batch, arguments.size, arguments.rounds) for name in arguments.only for batch in arguments.batch}
    console = Console(width=110)
    for title, rows in found.items():
        console.print(table(f"{title}, {arguments.size}×{arguments.size}, {torch.get_num_threads()} threads", rows))
    console.print("calling: " + ", ".join(f"{form} {time:.1f} µs" for form, time in calling().items()) + " a tiny convolution with relu")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


def network(name: str) -> nn.Module:
    """The network with weights that keep the scale of what goes through, so that no number is denormal or infinite."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


@torch.no_grad()
def measure(name: str, batch: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    model, x = network(name), torch.randn(batch, 3, size, size)
    compiled = sc.compile(model, (x,), recipe="lower()")
    last, x_last = copy.deepcopy(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    frozen, warnings = dense_forms(model, (x,), {}, ("compile",))
    forms: dict[str, Callable[[], object]] = {"eager": lambda: model(x), "eager, channels last": lambda: last(x_last), **frozen}
    timings = interleave({COMPILED: lambda: compiled(x), **forms}, rounds=rounds, warmup=3, at_most=60.0, repeats=2)
    for warning in warnings:
        Console(stderr=True).print(warning)
    return {form: {"median": t.median, "low": t.low, "high": t.high} for form, t in timings.items()}


@torch.no_grad()
def calling(layers: int = 100) -> dict[str, float]:
    """Microseconds a layer of a chain of convolutions and relu so small that calling them is all that takes time, by form."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU()))).eval()
    x = torch.randn(1, 8, 4, 4)
    compiled = sc.compile(model, (x,), recipe="lower(margin=-1000.0, rounds=3)")
    frozen, _ = dense_forms(model, (x,), {}, ("eager", "compile"))
    timings = interleave({COMPILED: lambda: compiled(x), **frozen}, rounds=101)
    return {form: 1e3 * timing.low / layers for form, timing in timings.items()}


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    made = Table(title=title)
    columns: Sequence[str] = ("form", "ms", "quartiles", "this / compiled")
    for column in columns:
        made.add_column(column, justify="left" if column == "form" else "right")
    for form, row in rows.items():
        ratio = row["median"] / rows[COMPILED]["median"]
        made.add_row(form, f"{row['median']:.2f}", f"{row['low']:.2f}–{row['high']:.2f}", f"{ratio:.2f}")
    return made


if __name__ == "__main__":
    main()
