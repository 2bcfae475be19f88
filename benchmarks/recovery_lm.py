"""SmolLM2 recovered: a sparse language model trained on plain text to give the words that the dense one gives.

    python benchmarks/recovery_lm.py --brown FOLDER [--cases "50 %" "2:4"] [--steps 70] [--rows 4] [--length 256] [--json FILE] [--checkpoints FOLDER]

All linear layers but the tied head are cut in one shot by `aligned`, the best that this package has, and sc.recover() trains them and the norms on
the Brown files that are not held out (the embeddings are frozen), in batches of rows × length tokens, in bfloat16 autocast. Perplexity on Lee and on
held-out Brown is measured before the first and behind the last step; nothing is chosen by it: --split choose measures on other texts. A killed run
goes on where it was (--checkpoints); the cut itself does so with SPARSIFY_CHECKPOINT=FOLDER.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recovery import recovered
from rich.console import Console
from rich.table import Table
from subjects import SmolLM2, brown, options

import sparsify_compiler as sc

CASES = {"50 %": ("unstructured", 0.5), "2:4": ("2:4", None)}
LOSSES = ("squarehead", "logits")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    subject = SmolLM2(arguments)
    batches = Texts(arguments)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for case in arguments.cases:
        about = {"case": case, **{name: getattr(arguments, name) for name in ("steps", "rows", "length", "rate", "samples", "split")},
                 "losses": list(arguments.losses)}
        if not any(about.items() <= row.items() for row in rows):
            rows.append({**about, **measured(subject, batches, case, arguments)})
            Console(stderr=True).print(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def measured(subject: SmolLM2, batches: Texts, case: str, arguments: Any) -> dict[str, Any]:
    """The language model cut, and recovered."""
    model = subject.model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    dynamic = {"input_ids": {0: "batch", 1: "tokens"}}
    structure, density = CASES[case]
    module, hook = sc.attach(model, subject.batches[0], sc.recipes.aligned(structure, density), calibration=subject.batches, dynamic=dynamic)
    name = f"{case} {arguments.steps} {arguments.rows} {arguments.length} {arguments.samples}.safetensors".replace(" ", "-")
    file = arguments.checkpoints / name if arguments.checkpoints else None
    return recovered(subject, module, hook, batches, dynamic, file, steps=arguments.steps, rate=arguments.rate, losses=arguments.losses)


class Texts:
    """All texts that are not held out, in pieces of `length` tokens, shuffled, in batches of `rows`; the same every time."""

    def __init__(self, arguments: Any) -> None:
        from subjects import smollm2

        tokenizer = smollm2(arguments.cache)[1]
        texts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in brown(arguments.brown, arguments.split)[0]]
        pieces = [piece for text in texts for piece in text.split(arguments.length) if len(piece) == arguments.length]
        ids = torch.stack(pieces)[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
        self._batches = [batch for batch in ids.split(arguments.rows) if len(batch) == arguments.rows]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([{"input_ids": batch, "use_cache": False} for batch in self._batches])


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="SmolLM2 recovered on Brown: perplexity before → after")
    for name in ("case", "steps", "tokens a step", "density", "Lee", "Brown", "processor s"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        names = [name for name in ("perplexity Lee", "perplexity Brown") if name in row["before"]]
        found = [""] * (2 - len(names)) + [f"{row['before'][name]:.2f} → {row['after'][name]:.2f}" for name in names]
        table.add_row(row["case"], str(row["steps"]), str(row["rows"] * row["length"]), f"{row['density']:.3f}", *found,
                      str(row["processor seconds"] or "resumed"))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
