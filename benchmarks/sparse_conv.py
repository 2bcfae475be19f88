"""Networks whose 1×1 convolutions are sparse: compiled by us, against every dense form that torch has, interleaved in one process.

    python benchmarks/sparse_conv.py [--json FILE] [--networks mobilenet lite] [--cases 0.9:unstructured 0.75:16x1] [--batch 1] [--rounds 31]

    mobilenet   MobileNetV1 (arXiv:1704.04861), relu
    lite        EfficientNet-Lite0, relu6

224×224, norms folded as an exact reparameterisation leaves them, weights random (speed does not depend on them), every 1×1 convolution at the same
sparsity. Dense forms: eager; channels last; torch.compile with frozen weights; each in float32 and bfloat16. Ratios are this form / compiled by us.
peers.py measures MobileNetV1 beside other engines.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conv import NETWORKS as DENSE_NETWORKS
from peer_cases import mobilenet_v1
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.measure import interleave
from sparsify_compiler.yardstick import dense_forms

CASES = ("0.75:unstructured", "0.9:unstructured", "0.75:16x1", "0.9:16x1")


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mobilenet": mobilenet_v1, "lite": DENSE_NETWORKS["lite"]}


def network(name: str, seed: int = 0) -> nn.Module:
    """The dense network with weights that keep the scale of what goes through, so that no number is denormal or infinite."""
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def ours(model: nn.Module, inputs: tuple[Tensor, ...], sparsity: float, structure: str) -> Any:
    """The network compiled with its 1×1 convolutions pruned by magnitude, all that is left dense lowered too."""
    pointwise = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    cut = f'mask_weights(score=magnitude, structure="{structure}", density={1 - sparsity:.4g}, targets={pointwise!r})'
    return sc.compile(model, inputs, recipe=sc.Pipeline.parse(f"{cut} | pack() | lower()"))


@torch.no_grad()
def forms(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The dense network in every form that torch has."""
    found: dict[str, Callable[[], object]] = {}
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain, given = copy.deepcopy(model).to(dtype), x.to(dtype)
        last, given_last = copy.deepcopy(plain).to(memory_format=torch.channels_last), given.contiguous(memory_format=torch.channels_last)
        found[f"eager {word}"] = lambda plain=plain, given=given: plain(given)
        found[f"eager {word}, channels last"] = lambda last=last, given=given_last: last(given)
        compiled, warnings = dense_forms(plain, (given,), {}, ("compile",))
        found |= compiled
        for warning in warnings:
            Console(stderr=True).print(warning)
    return found


@torch.no_grad()
def measure(name: str, batch: int, cases: list[str], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of every form, by its name."""
    model, x = network(name), torch.randn(batch, 3, 224, 224)
    made = forms(model, x)
    for case in cases:
        sparsity, _, structure = case.partition(":")
        compiled = ours(model, (x,), float(sparsity), structure)
        made[f"ours {100 * float(sparsity):g} % {structure}"] = lambda compiled=compiled: compiled(x)
        Console().print(compiled.report())
    timings = interleave(made, rounds=rounds, warmup=3, at_most=seconds, repeats=2)
    return {form: {"median": t.median, "low": t.low, "high": t.high} for form, t in timings.items()}


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    made = Table(title=title)
    mine = [form for form in rows if form.startswith("ours")]
    for column in ("form", "ms", "quartiles", *(f"this / {form}" for form in mine)):
        made.add_column(column, justify="left" if column == "form" else "right")
    for form, row in rows.items():
        ratios = [f"{row['median'] / rows[one]['median']:.2f}" for one in mine]
        made.add_row(form, f"{row['median']:.2f}", f"{row['low']:.2f}–{row['high']:.2f}", *ratios)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="sparsity:structure")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring a network, at the most")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.networks:
        for batch in arguments.batch:
            title = f"{name}, batch {batch}, {torch.get_num_threads()} threads"
            found[title] = measure(name, batch, arguments.cases, arguments.rounds, arguments.seconds)
            Console(width=150).print(table(title, found[title]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
