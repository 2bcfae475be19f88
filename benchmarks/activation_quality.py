"""Quality of activation sparsity on real language: perplexity of SmolLM2 when each token reads a part of the weights only.

    python benchmarks/activation_quality.py --brown FOLDER [--json FILE] [--methods wina ...] [--sparsities 25 40 ...] [--sites all ffn]
                                            [--prompt 256]

Model, texts and splits are those of subjects.py: calibration on 512 tokens each of --samples Brown files, measured on others of its files and on
the Lee news, --texts × 512 tokens each; `--split choose` measures on a third set of Brown files, where settings are chosen. Sparsity is the
share of weights, of all linear layers but the tied head ("all") or of the FFNs ("ffn"), that a token does not read: selected by every token, those
of the prompt too. The densities that come of it on the calibration's rows are shown. A method is one line of METHODS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import subjects as language
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

from sparsify_compiler import recipes
from sparsify_compiler.call import instantiate
from sparsify_compiler.passes.prune._low_rank import MARK
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

SITES = {"all": ("linear",), "ffn": ("ffn",)}
Made = Callable[[float, tuple[str, ...]], Pipeline]
FFN, LARGE = 3 / 4, 3 / 16  # of SmolLM2's weights: its FFNs; queries and outputs of attention
STEP = 31  # tokens of a call behind the prompt: fewer than hold_neurons() takes for a prompt


class Continued(language.SmolLM2):
    """SmolLM2 as it runs inside generate(): captured in parts, with a cache; measured on what follows a prompt."""

    def __init__(self, arguments: Any) -> None:
        self.prompt: int = arguments.prompt
        super().__init__(arguments)

    def capture(self, dynamic: dict[str, dict[int, str]] | None = None) -> None:
        self.batches = [{"input_ids": batch["input_ids"]} for batch in self.batches]
        super().capture({"input_ids": {0: "batch", 1: "tokens"}})

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {f"perplexity {name}": math.exp(sum(map(partial(self._loss, model), text)) / len(text)) for name, text in self.texts.items()}

    def _loss(self, model: nn.Module, tokens: torch.Tensor) -> float:
        made: Any = model(input_ids=tokens[None, : self.prompt], use_cache=True)
        logits = [made.logits[0, -1:]]
        for part in tokens[self.prompt :].split(STEP):
            made = model(input_ids=part[None], past_key_values=made.past_key_values, use_cache=True)
            logits.append(made.logits[0])
        return float(cross_entropy(torch.cat(logits)[:-1].float(), tokens[self.prompt :]))


def cats(density: float, targets: tuple[str, ...]) -> Pipeline:
    """The gate is read wholly: as many neurons as make the density of the FFNs, or of the model, with the rest of it dense."""
    return recipes.cats((3 * of_ffns(density, targets) - 1) / 2)


def chess(density: float, targets: tuple[str, ...]) -> Pipeline:
    """Likewise; of the whole model also, at the density of the neurons, the inputs of queries and outputs."""
    if targets == SITES["ffn"]:
        return recipes.chess((3 * density - 1) / 2)
    return recipes.chess(1 - (1 - density) / (2 / 3 * FFN + LARGE), ("attention:q", "attention:out"))


def of_ffns(density: float, targets: tuple[str, ...]) -> float:
    """The density of the FFNs that makes a density of what is selected in: of themselves, or of the model with the rest of it dense."""
    return density if targets == SITES["ffn"] else 1 - (1 - density) / FFN


METHODS: dict[str, Made] = {
    "per token": lambda density, targets: recipes.q_sparse(density, targets),  # the same number of inputs for each, of highest magnitude
    "teal uniform": lambda density, targets: recipes.teal(density, "uniform", targets),
    "teal greedy": lambda density, targets: recipes.teal(density, "greedy", targets),
    "teal block greedy": lambda density, targets: recipes.teal(density, "block_greedy", targets),
    "wina": lambda density, targets: recipes.wina(density, targets=targets),
    "wina threshold": lambda density, targets: recipes.wina(density, "threshold", targets=targets),
    "cats": cats,
    "chess": chess,
    "spark": lambda density, targets: recipes.spark(density, targets),  # of every layer's inputs, not of the neurons alone
    "sparsing law": lambda density, targets: recipes.sparsing_law(density, targets),
    "r-sparse": lambda density, targets: recipes.r_sparse(density, targets=targets),
    "core infer": lambda density, targets: recipes.core_infer(of_ffns(density, targets)),
    "core infer by output": lambda density, targets: recipes.core_infer(of_ffns(density, targets), share=0.0),
    "ffn-skip": lambda density, targets: recipes.ffn_skip_llm(of_ffns(density, targets)),
    "magnitude + sensitivity": lambda density, targets: recipes.teal(density, "sensitivity", targets),
    "sensitive inputs": lambda density, targets: recipes.sensitive_inputs(density, targets),
    "rotated inputs": lambda density, targets: recipes.rotated_inputs(density, targets=targets),
}


def main() -> None:
    parser = language.options(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=int, default=[25, 40, 50, 60])
    parser.add_argument("--sites", nargs="+", choices=list(SITES), default=["all"])
    parser.add_argument("--prompt", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    subject = Continued(arguments) if arguments.prompt else language.SmolLM2(arguments)
    subject.texts = {name: text[: arguments.texts] for name, text in subject.texts.items()}
    cells = [("all", "dense", 0)] + [(sites, method, sparsity) for sites in arguments.sites for sparsity in arguments.sparsities
                                     for method in arguments.methods]
    for sites, method, sparsity in cells:
        if not any((row["sites"], row["method"], row["sparsity"]) == (sites, method, sparsity) for row in rows):
            rows.append({"sites": sites, "method": method, "sparsity": sparsity, **measured(subject, sites, method, 1 - sparsity / 100)})
            Console(stderr=True).print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()))
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2))
    show(rows)


def measured(subject: language.SmolLM2, sites: str, method: str, density: float) -> dict[str, Any]:
    """The density that came of it, and the perplexities."""
    if method == "dense":
        return {"density": 1.0, **subject.measure(subject.model)}
    made = METHODS[method] if method in METHODS else lambda density, targets: Pipeline.parse(method.format(density=density, targets=targets))
    program = subject.prune(made(density, SITES[sites]), cache=True)
    return {"density": density_of(program), **subject.measure(instantiate(program))}


def density_of(program: Program) -> float:
    """Weights that a token reads / all, of the layers that select: the gate of an FFN is read wholly, and a low-rank part beside a layer too."""
    read = every = 0.0
    for row in program.decisions.values():
        size = row.shape[0] * row.shape[1] if len(row.shape) == 2 else 0
        kind = row.structure.partition(" ")[0]
        neurons = 3 * row.density if row.structure == "neurons held" else 1 + 2 * row.density
        read += {"inputs": row.density, "neurons": neurons, "rows": 3 * row.density}.get(kind, 0.0) * size
        every += {"inputs": 1, "neurons": 3, "rows": 3}.get(kind, 0) * size
    beside = sum(node.kwargs["weight"].meta["val"].numel() for _, node in program.nodes() if MARK in node.meta)  # type: ignore[union-attr]
    return (read + beside) / max(every, 1)


def show(rows: list[dict[str, Any]]) -> None:
    console, dense = Console(width=130), rows[0]
    measures = [key for key in dense if key.startswith("perplexity")]
    for sites in dict.fromkeys(row["sites"] for row in rows[1:]):
        table = Table(title=f"SmolLM2, {sites} layers, dense " + ", ".join(f"{key.split()[1]} {dense[key]:.2f}" for key in measures))
        for column in ("sparsity", "method", "density", *(name for key in measures for name in (key, "increase"))):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in (row for row in rows[1:] if row["sites"] == sites):
            numbers = [text for key in measures for text in (f"{row[key]:.2f}", f"+{100 * (row[key] / dense[key] - 1):.1f} %")]
            table.add_row(f"{row['sparsity']} %", row["method"], f"{row['density']:.3f}", *numbers)
        console.print(table)


if __name__ == "__main__":
    main()
