"""Predictors of neurons beside the oracle, on SmolLM2: how many of the neurons that matter most they find, and the perplexity.

    python benchmarks/predictors.py --brown FOLDER [--samples 16] [--on Lee] [--json FILE] [--methods "deja vu" ...] [--sparsities 25 50]

Model, texts and splits are those of subjects.py. Sparsity is the share of each FFN's neurons that a token skips, gate, up and down alike; every token
selects. The oracle knows what the predictors are trained to find: the same number of neurons for each token, those that give most, all computed.
Recall is that of the calibration's rows that no predictor was trained on, the mean over the layers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import subjects as language
import torch
from rich.console import Console
from rich.table import Table

from sparsify_compiler import recipes
from sparsify_compiler.call import instantiate
from sparsify_compiler.passes.activation.estimate_neurons import EstimateNeurons
from sparsify_compiler.passes.activation.predict_neurons import PredictNeurons
from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline

METHODS: dict[str, Callable[[float], Pipeline]] = {
    "oracle": lambda density: Pipeline((SelectInputs("weight_norm", "top_k", "uniform", density, targets=("ffn:down",)),)),
    "deja vu": lambda density: recipes.deja_vu(density),
    "shadowllm": lambda density: recipes.shadowllm(density),
    "low-rank copy": lambda density: Pipeline((EstimateNeurons(density, 74),)),  # as many weights to read as Deja Vu's network of rank 128
    "low-rank copy, rank 128": lambda density: Pipeline((EstimateNeurons(density, 128),)),
    "gate": lambda density: recipes.cats(density),  # every gate is computed, in full
    "one for all, magnitude": lambda density: Pipeline((PredictNeurons(density, "model", "magnitude", 256),)),
}


def main() -> None:
    parser = language.options(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--on", nargs="+", default=["Lee", "Brown"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=int, default=[25, 50])
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    subject = language.SmolLM2(arguments)
    subject.texts = {name: text[: arguments.texts] for name, text in subject.texts.items() if name in arguments.on}
    for sparsity, method in [(0, "dense"), *((sparsity, method) for sparsity in arguments.sparsities for method in arguments.methods)]:
        if not any((row["sparsity"], row["method"]) == (sparsity, method) for row in rows):
            rows.append({"sparsity": sparsity, "method": method, **measured(subject, method, 1 - sparsity / 100)})
            Console(stderr=True).print(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))
    table = Table(title="SmolLM2, neurons of all FFNs")
    for column in ("sparsity", "method", "density", "recall", *(key for key in rows[0] if key.startswith("perplexity")), "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*(f"{row[key.header]:.3f}" if isinstance(row[key.header], float) else str(row[key.header]) for key in table.columns))
    Console(width=130).print(table)


def measured(subject: language.SmolLM2, method: str, density: float) -> dict[str, Any]:
    """The density that came of it, the mean recall, the perplexities, and seconds of processor of the training."""
    if method == "dense":
        return {"density": 1.0, "recall": "", "seconds": 0.0, **subject.measure(subject.model)}
    spent = time.process_time()
    program = subject.prune(METHODS[method](density))
    spent = time.process_time() - spent
    sites = list(program.decisions.values())
    found = [int(share) / 100 for row in sites for share in re.findall(r"finds (\d+)%", row.reason)]
    recall = sum(found) / len(found) if found else ""
    return {"density": sum(row.density for row in sites) / len(sites), "recall": recall, "seconds": spent, **subject.measure(instantiate(program))}


if __name__ == "__main__":
    main()
