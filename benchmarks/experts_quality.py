"""Quality of dense FFNs that became experts: partitions, routers and repairs against the oracle router, on real models and real text.

    python benchmarks/experts_quality.py --brown FOLDER [--model smollm2 minilm] [--json FILE] [--split choose] [--partitions ...] [--routers ...]
                                         [--densities 0.75 0.5 0.375] [--experts 16] [--shared 0.25] [--repair mean] [--texts 4]

Models, texts and splits are those of subjects.py: calibration on other Brown files than those that are measured; `--split choose` measures on a third
set of Brown files, where settings are chosen. Density is the share of all FFN neurons that a row computes, the shared ones among them. The rows of
calibration are gathered once, of the dense model, and serve every cell. "lost to the oracle" is how much of the quality between the dense model and
the oracle router's the router loses on top: (router - oracle) / (oracle - dense), of the perplexity's logarithm or of the cosine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import subjects
import torch
from rich.console import Console
from rich.table import Table

from sparsify_compiler.call import instantiate
from sparsify_compiler.passes.moe._evidence import Evidence
from sparsify_compiler.passes.moe._sites import Dense, dense_of, gather
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.sites import find_sites

MODELS: dict[str, type[subjects.Subject]] = {"smollm2": subjects.SmolLM2, "minilm": subjects.MiniLM}
PARTITIONS = ["contiguous", "random", "balanced_kmeans", "activity_kmeans", "coactivation_graph", "by_importance"]
ROUTERS = ["oracle", "mlp", "logistic", "ridge", "representative", "mean_weights", "random"]
NAME = "split_experts"


def main() -> None:
    parser = subjects.options(__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--texts", type=int, default=subjects.MEASURED)
    parser.add_argument("--partitions", nargs="+", default=PARTITIONS)
    parser.add_argument("--routers", nargs="+", default=ROUTERS)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.75, 0.5, 0.375])
    for option in ("repair", "importance", "selector", "criterion"):
        parser.add_argument(f"--{option}", nargs="+", default=[getattr(SplitExperts(), option)])
    parser.add_argument("--experts", nargs="+", type=int, default=[16])
    parser.add_argument("--shared", nargs="+", type=float, default=[0.25])
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for model in arguments.model:
        bench = Bench(model, arguments)
        for options in cells(arguments):
            if not any(row["model"] == model and row["options"] == options for row in rows):
                rows.append({"model": model, "options": options, **bench.measured(options)})
                Console(stderr=True).print(model, *options.values(), {k: v for k, v in rows[-1].items() if k not in ("model", "options")})
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    for model in arguments.model:
        show(model, [row for row in rows if row["model"] == model])


def cells(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The dense model, and every combination of options."""
    axes = {"density": arguments.densities, "partition": arguments.partitions, "router": arguments.routers, "repair": arguments.repair,
            "experts": arguments.experts, "shared": arguments.shared, "importance": arguments.importance, "selector": arguments.selector,
            "criterion": arguments.criterion}
    return [{}, *(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))]


class Bench:
    """One model with what calibration saw of its FFNs."""

    def __init__(self, model: str, arguments: argparse.Namespace) -> None:
        self.subject = MODELS[model](arguments)
        if isinstance(self.subject, subjects.SmolLM2):
            self.subject.texts = {name: text[: arguments.texts] for name, text in self.subject.texts.items()}
        program = self.subject.captured
        found = [dense for site in find_sites(program, ("ffn",)) if isinstance(dense := dense_of(program.regions[site.region], site, NAME), Dense)]
        slopes = any("importance" in text or "taylor" in text for text in [*arguments.partitions, *arguments.importance])
        ctx = Context(batches=self.subject.batches)
        self.evidence: list[Evidence] = [one for _, one in gather(program, found, frozenset({"rows", "slopes"} if slopes else {"rows"}), ctx)]

    def measured(self, options: dict[str, Any]) -> dict[str, float]:
        """What a row computes, and the quality."""
        if not options:
            return {"computed": 1.0, **self.subject.measure(self.subject.model)}
        program = self.subject.captured.clone()
        split(program, SplitExperts(**options), self.evidence)
        computed = [row.density for row in program.decisions.values()]
        return {"computed": sum(computed) / len(computed), **self.subject.measure(instantiate(program))}


def split(program: Program, item: SplitExperts, evidence: list[Evidence]) -> None:
    """The pass on every FFN, by rows that were gathered before."""
    for site, one in zip(find_sites(program, ("ffn",)), evidence, strict=True):
        dense = dense_of(program.regions[site.region], site, NAME)
        assert isinstance(dense, Dense)
        item.split(program, dense, one, item.density)
    program.stage = Stage.SPARSE
    for region in program.regions.values():
        region.module.recompile()


def loss_of(row: dict[str, Any], measure: str) -> float:
    return math.log(row[measure]) if measure.startswith("perplexity") else -float(row[measure])


def show(model: str, rows: list[dict[str, Any]]) -> None:
    dense = next(row for row in rows if not row["options"])
    measures = [key for key in dense if key not in ("model", "options", "computed")]
    split = [row for row in rows if row["options"]]
    varied = [key for key in split[0]["options"] if len({str(row["options"][key]) for row in split}) > 1]
    table = Table(title=f"{model}, dense " + ", ".join(f"{measure} {dense[measure]:.4g}" for measure in measures))
    for column in (*varied, "computed", *measures, "lost to the oracle"):
        table.add_column(column, justify="left" if column in ("partition", "router") else "right")
    for row in split:
        best = next((other for other in split if other["options"] == {**row["options"], "router": "oracle"}), None)
        lost = "-"
        if best is not None and best is not row:
            base, bound, own = (loss_of(one, measures[-1]) for one in (dense, best, row))
            lost = f"{(own - bound) / max(bound - base, 1e-9):.2f}"
        table.add_row(*(str(row["options"][key]) for key in varied), f"{row['computed']:.3f}", *(f"{row[key]:.4g}" for key in measures), lost)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
