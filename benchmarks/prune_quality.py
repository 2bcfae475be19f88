"""Quality of one-shot masks on real models and data: SmolLM2, MiniLM, MPNet and EfficientNet-lite0.

    python benchmarks/prune_quality.py --brown FOLDER [--json FILE] [--methods wanda ...] [--structures 50% 2:4 ...] [--model smollm2 minilm]

FOLDER is the unpacked Brown corpus; subjects.py and photos.py tell where models and data come from. A killed run goes on where --json has got to.

All linear layers but a tied head are pruned; of EfficientNet the 1×1 convolutions of its blocks, each method without and with BatchNorms that are
calibrated again ("BN", or relative to the dense model's own, "relative BN"). Calibration: 512 tokens each from --samples Brown files, spread over the
corpus (encoders: 8 × 64 tokens of each), or crops of photographs. Measured on others of its files (8 × 512 tokens; 8 × 8 × 64), on the Lee news and
the Lee pairs, and on other photographs, none of which any method has seen. `--split choose` measures on a third set: the settings of methods are
chosen there, and only there.
A method is one line of METHODS.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from photos import Photos
from rich.console import Console
from rich.table import Table
from subjects import MiniLM, MPNet, SmolLM2, Subject, options

from sparsify_compiler import recipes
from sparsify_compiler.call import instantiate
from sparsify_compiler.passes.prune.recalibrate_batchnorm import RecalibrateBatchnorm
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

STRUCTURES = {"30%": ("unstructured", 0.7), "50%": ("unstructured", 0.5), "60%": ("unstructured", 0.4), "70%": ("unstructured", 0.3),
              "80%": ("unstructured", 0.2), "90%": ("unstructured", 0.1), "2:4": ("2:4", 0.5), "4:8": ("4:8", 0.5), "50% 16x1": ("16x1", 0.5)}
SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {"smollm2": SmolLM2, "minilm": MiniLM, "mpnet": MPNet, "efficientnet": Photos}
SHOWN = {"smollm2": ["30%", "50%", "60%", "2:4", "4:8", "50% 16x1"], "minilm": ["50%", "70%", "80%", "90%"], "mpnet": ["50%", "70%", "80%", "90%"],
         "efficientnet": ["50%", "60%", "70%", "80%", "90%"]}
Method = Callable[[str, float], Pipeline]
METHODS: dict[str, Method] = {
    "magnitude": lambda structure, density: recipes.magnitude(structure, density),
    "wanda": lambda structure, density: recipes.wanda("row" if structure == "unstructured" else structure, density, inputs="block"),
    "sparsegpt": lambda structure, density: recipes.sparsegpt(structure, density),
    "dsnot": lambda structure, density: recipes.dsnot("row" if structure == "unstructured" else structure, density),
    "dass": lambda structure, density: dass(structure, density),
    "aligned": lambda structure, density: recipes.aligned(structure, density),
}
UNFIT = {("dsnot", "50% 16x1"), ("dass", "50% 16x1")}  # in a block no weight can take another's place; DaSS has no blocks
POINTWISE = ("re:.*_(expand_conv|project_conv|conv_head)",)  # the 1×1 convolutions of EfficientNet
OF_CONVOLUTIONS: dict[str, Method] = {
    "magnitude": lambda structure, density: recipes.magnitude("row", density, targets=POINTWISE),
    "wanda": lambda structure, density: recipes.wanda("row", density, targets=POINTWISE),
    "sparsegpt": lambda structure, density: recipes.sparsegpt(structure, density, targets=POINTWISE, inputs="pruned"),
    "aligned": lambda structure, density: recipes.aligned(structure, density, targets=POINTWISE),
}
OF_CONVOLUTIONS |= {f"{name}, {suffix}": lambda structure, density, method=method, norms=norms: method(structure, density) | norms
                    for suffix, norms in (("BN", RecalibrateBatchnorm()), ("relative BN", RecalibrateBatchnorm(relative=True)))
                    for name, method in OF_CONVOLUTIONS.items()}


def methods_of(model: str) -> dict[str, Method]:
    return OF_CONVOLUTIONS if model == "efficientnet" else METHODS


def dass(structure: str, density: float) -> Pipeline:
    """DaSS in the FFNs, as in its paper, and Wanda in attention, so that all linear layers are cut."""
    n, m = map(int, structure.split(":")) if ":" in structure else (2, 4)
    elsewhere = recipes.wanda("row" if structure == "unstructured" else structure, density, targets=("attention",), inputs="block")
    return recipes.dass(n, m, None if ":" in structure else density) | elsewhere


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", nargs="+", choices=list(SHOWN), default=["smollm2"])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *OF_CONVOLUTIONS])
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text())["rows"] if arguments.json and arguments.json.exists() else []
    done = {(row["model"], row["method"], row["structure"]) for row in rows}
    for name in arguments.model:
        methods = [method for method in methods_of(name) if method in (arguments.methods or methods_of(name))]
        wanted = [("dense", "")] + [(method, structure) for structure in arguments.structures or SHOWN[name] for method in methods]
        wanted = [cell for cell in wanted if (name, *cell) not in done and cell not in UNFIT]
        subject = SUBJECTS[name](arguments) if wanted else None
        for method, structure in wanted:
            assert subject is not None
            rows.append({"model": name, "method": method, "structure": structure, **measured(subject, methods_of(name).get(method), structure)})
            tell(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps({"samples": arguments.samples, "rows": rows}, indent=2))
    show([row for row in rows if row["model"] in arguments.model], arguments.samples)


def measured(subject: Subject, method_of: Method | None, structure: str) -> dict[str, Any]:
    """One cell: wall and processor seconds of pruning, the density that came of it, and the measures."""
    if method_of is None:
        return {"seconds": 0.0, **subject.measure(subject.model)}
    start, spent = time.perf_counter(), time.process_time()
    pruned = subject.prune(method_of(*STRUCTURES[structure]))
    about = {"seconds": time.perf_counter() - start, "processor": time.process_time() - spent, "density": density_of(pruned)}
    return {**about, **subject.measure(instantiate(pruned))}


def tell(row: dict[str, Any]) -> None:
    Console(stderr=True).print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))


def show(rows: list[dict[str, Any]], samples: int) -> None:
    console = Console(width=110)
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        measures = [key for key in mine[0] if key not in ("model", "method", "structure", "seconds", "processor", "density")]
        table = Table(title=f"{model}, {samples} samples to calibrate on, {torch.get_num_threads()} threads")
        for column in ("structure", "method", "density", *measures, "processor s"):
            table.add_column(column, justify="left" if column in ("structure", "method") else "right")
        for row in mine:
            numbers = [f"{row[key]:.4g}" for key in measures]
            table.add_row(row["structure"], row["method"], f"{row.get('density', 1.0):.3f}", *numbers, f"{row.get('processor', 0):.0f}")
        console.print(table)


def density_of(program: Program) -> float:
    pruned = [row for row in program.decisions.values() if row.structure != "dense"]
    sizes = [math.prod(row.shape) for row in pruned]
    return sum(row.density * size for row, size in zip(pruned, sizes, strict=True)) / max(sum(sizes), 1)


if __name__ == "__main__":
    main()
