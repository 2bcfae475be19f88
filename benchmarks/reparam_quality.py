"""Trained quality before and after the collapse, and what it buys: RepVGG, RePaViT and its dense twin on Fashion-MNIST; Tune mode's memory.

    python benchmarks/reparam_quality.py [--data FOLDER] [--cache FOLDER] [--epochs 2] [--images 60000] [--only trained,tune,large] [--json FILE]

trained   trains a small RepVGG, RePaViT (theta 0.75) and its dense twin, or takes them from the cache; top-1 on the 10,000 test images before and
          after the collapse, how many predictions differ (with the margins of those that do), milliseconds of each form
tune      one training step of ResNet-like conv blocks with the statistics of their norms fixed: what is kept for the backward pass, and the time,
          as trained (Eval mode) and with conv and norm in one (Tune mode)
large     an FFN and a whole layer of ViT-Large's shape (1024, 4096, 197 tokens): dense, with three quarters of the FFN's channels idle, merged by us
          and by hand

About 8 minutes of two quiet cores when nothing is in the cache. Times are medians with quartiles, all forms of a table interleaved. The data come
with Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import FOLDER, AbsentError, Attention, Ffn, Images, accuracy, images, logits, trained
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.pipeline import Pipeline

RECIPE = "reparam"
_ATTENTION = ["layer_norm", "linear", "unflatten", "permute", "unbind", "scaled_dot_product_attention", "transpose", "flatten", "linear", "add"]
EXPECTED = {
    "repvgg": ["conv2d", "relu"] * 6 + ["adaptive_avg_pool2d", "flatten", "linear"],
    "repavit": ["conv2d", "flatten", "mT", "add", *4 * [*_ATTENTION, "linear", "gelu", "linear", "linear", "add"], "layer_norm", "mean", "linear"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--only", default="trained,tune,large")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console, sections = Console(width=120), {"trained": trained_quality, "tune": tune_mode, "large": vit_large}
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    try:
        for name in arguments.only.split(","):
            if name not in sections:
                parser.error(f"--only takes {', '.join(sections)}, not {name!r}")
            found[name] = sections[name](arguments, console)
    except AbsentError as absent:
        sys.exit(str(absent))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


def default_cache() -> Path:
    """$SPARSIFY_CACHE/reparam_quality, or the same in the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("SPARSIFY_CACHE") or platformdirs.user_cache_dir("sparsify_compiler")) / "reparam_quality"


# --- trained networks --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Top-1 before and after, how many predictions differ, the largest difference of a score relative to the largest score, and the margins
    between the two classes in question where they differ (relative too)."""

    before: float
    after: float
    differing: int
    error: float
    margins: tuple[float, ...]


def compare(before: nn.Module, after: nn.Module, data: Images) -> Compared:
    """Two forms of one network on every image."""
    old, new = logits(before, data), logits(after, data)
    changed = (old.argmax(1) != new.argmax(1)).nonzero().flatten()
    scale = float(old.abs().max())
    margins = [float(old[i, old[i].argmax()] - old[i, new[i].argmax()]) / scale for i in changed.tolist()]
    return Compared(accuracy(old, data), accuracy(new, data), len(margins), float((old - new).abs().max()) / scale, tuple(margins))


def collapsed(model: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """The network with every linear region in one op, as a plain module."""
    return sc.reparameterize(model, example, recipe=RECIPE)


def structure(model: nn.Module) -> list[str]:
    """The ops of a captured module, in order."""
    return [str(node.target).split(".")[1] for node in model._graph[0].graph.nodes if node.op == "call_function" and "aten" in str(node.target)
            and "sym_size" not in str(node.target)]


def trained_quality(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Trains or loads, compares all test images, times all forms."""
    train, test = images("train", arguments.data, arguments.images), images("t10k", arguments.data)
    models = {name: trained(name, train, arguments.epochs, arguments.cache, console.print) for name in ("repvgg", "vit", "repavit")}
    after = {name: collapsed(models[name], (test.pixels[:2],)) for name in ("repvgg", "repavit")}
    rows = {name: compare(models[name], after[name], test) for name in after}
    table = Table(title=f"Fashion-MNIST, {arguments.epochs} epochs of {len(train.labels)} images, top-1 on {len(test.labels)} test images (float32)")
    for column in ("network", "parameters", "collapsed", "before", "after", "differing", "error"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, row in rows.items():
        quality = f"{row.before:.4f}", f"{row.after:.4f}", str(row.differing), f"{row.error:.1e}"
        table.add_row(name, _millions(models[name]), _millions(after[name]), *quality)
    dense = accuracy(logits(models["vit"], test), test)
    table.add_row("vit (dense twin)", _millions(models["vit"]), "", f"{dense:.4f}", "", "", "")
    console.print(table)
    for name, row in rows.items():
        for margin in row.margins:
            console.print(f"{name}: a prediction changed between classes whose scores differ by {margin:.1e} of the largest score")
    groups = {"RepVGG": {"as trained": models["repvgg"], "collapsed": after["repvgg"]},
              "RePaViT": {"dense twin": models["vit"], "as trained": models["repavit"], "collapsed": after["repavit"]}}
    timings = {f"{name} {batch}": timed(console, f"{name}, batch {batch}", forms, test.pixels[:batch])
               for name, forms in groups.items() for batch in (1, 64)}
    return {"quality": {name: asdict(row) for name, row in rows.items()}, "dense twin": dense, "milliseconds": timings}


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} M"


def timed(console: Console, title: str, forms: Mapping[str, Callable[[Tensor], object]], x: Tensor) -> dict[str, Any]:
    """A table of the forms' times on one input; ratios are first / this."""
    with torch.inference_mode():
        timings = interleave({name: (lambda form=form: form(x)) for name, form in forms.items()}, rounds=31, warmup=3, at_most=30.0)
    print_times(console, title, timings)
    return {name: vars(t) for name, t in timings.items()}


def print_times(console: Console, title: str, timings: Mapping[str, Timing], extra: Mapping[str, Sequence[str]] | None = None,
                columns: Sequence[str] = ()) -> None:
    first = next(iter(timings.values())).median
    table = Table(title=f"{title}, {torch.get_num_threads()} threads")
    for column in ("form", "ms", "quartiles", "first / this", *columns):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name, t in timings.items():
        table.add_row(name, f"{t.median:.3f}", f"{t.low:.3f}–{t.high:.3f}", f"{first / t.median:.2f}", *(extra or {}).get(name, ()))
    console.print(table)


# --- Tune mode ---------------------------------------------------------------------------------------------------------------------------


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters, buffers and the input aside; each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values())


class Residual(nn.Module):
    """Two 3×3 convs with norms around a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        down = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.down: nn.Module = down if stride != 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x))))) + self.down(x))


def resnet() -> nn.Module:
    """The blocks of a ResNet-18 at half its width, behind a stem of stride 2."""
    plan = ((32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
    stem = (nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *(Residual(*block) for block in plan), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def tune_mode(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One training step of the network in eval mode, unfused and tuned."""
    x, labels = torch.randn(8, 3, 224, 224), torch.arange(8)
    model = resnet().eval()
    tuned = instantiate(Pipeline.parse("tune_convbn()").run(capture(copy.deepcopy(model), (x,))))
    forms = {"Eval mode": model, "Tune mode": tuned}

    def step(form: nn.Module) -> None:
        functional.cross_entropy(form(x), labels).backward()
        form.zero_grad()

    kept = {name: kept_bytes(form, x) for name, form in forms.items()}
    timings = interleave({name: (lambda form=form: step(form)) for name, form in forms.items()}, rounds=9, warmup=1, at_most=60.0)
    extra = {name: (f"{size / 2**20:.1f} MiB", f"{size / kept['Eval mode']:.2f}") for name, size in kept.items()}
    print_times(console, "One training step, 8 images of 224×224", timings, extra, ("kept for backward", "of Eval mode"))
    return {name: {"milliseconds": vars(timings[name]), "kept_bytes": kept[name]} for name in forms}


# --- ViT-Large ---------------------------------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """What RePaViT's authors write for inference: a thin FFN beside one linear."""

    def __init__(self, width: int, active: int) -> None:
        super().__init__()
        self.up, self.down, self.merged = nn.Linear(width, active), nn.Linear(active, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x))) + self.merged(x)


def vit_large(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One FFN with its norm and shortcut, and one whole layer: what the paper's factor for the model is made of."""
    width, heads, found = 1024, 16, {}
    attention, dense, idle, hand = Attention(width, heads), Ffn(width, 0), Ffn(width, 3 * width), ByHand(width, width)
    for part, before in (("FFN", nn.Identity()), ("layer", attention)):
        forms = {name: nn.Sequential(before, ffn).eval() for name, ffn in (("dense", dense), ("idle channels", idle), ("merged by hand", hand))}
        forms["merged"] = collapsed(forms["idle channels"], (torch.randn(2, 197, width),))
        for batch in (1, 8):
            x = torch.randn(batch, 197, width)
            found[f"{part} {batch}"] = timed(console, f"{part} of ViT-Large, batch {batch}, 197 tokens", forms, x)
    return found


if __name__ == "__main__":
    main()
