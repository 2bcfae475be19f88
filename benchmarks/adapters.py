"""What trains, beside what it brings: MiniLM with half of its weights (2:4), brought towards the dense model by adapters, subsets, or all weights.

    python benchmarks/adapters.py --brown FOLDER [--cases ...] [--steps 60] [--samples 16] [--json FILE]

Masks and weights are those of one-shot OBS, as in recovery.py, whose batches, losses and measures these are; embeddings are frozen in all cases.
"numbers" are those that train: where packed (subsets), the gradient and both moments of the optimizer have as many each. Every case has a learning
rate of its own, the first that was tried; --rates tries others, on other texts with --split choose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recovery import HESSIAN, LOSSES, Texts, recovered
from rich.console import Console
from rich.table import Table
from subjects import MiniLM, options

import sparsify_compiler as sc

MASKS = f"mask_weights(score='repair', structure=NM(n=2, m=4), {HESSIAN})"
CASES = {
    "all weights": ("", 1e-3),
    "masked low rank, 16 (SQFT)": (" | add_adapters(adapter='masked_low_rank(rank=16)')", 1e-3),
    "low rank beside, 16 (DSEE)": (" | add_adapters(adapter='low_rank(rank=16)')", 1e-3),
    "rows by columns, 4 (SPP)": (" | add_adapters(adapter='row_by_column(rank=4)')", 1e-2),
    "routed, 4 of rank 4 (MoLE)": (" | add_adapters(adapter='routed_low_rank(experts=4, rank=4)')", 1e-3),
    "cut networks behind, 32 (SparseAdapter)": (
        " | add_adapters(adapter='bottleneck(rank=32)')"
        " | mask_weights(score='gradient_times_weight', density=0.4, targets=('*.bottleneck_*',))", 1e-3),
    "places, 5 % (SMT)": (" | train_subset(score='gradient', density=0.05)", 1e-3),
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", help="in place of each case's own")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(samples=16)
    arguments = parser.parse_args()
    subject, batches = MiniLM(arguments), Texts(arguments)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for case in arguments.cases:
        for rate in arguments.rates or [CASES[case][1]]:
            about = {"case": case, "rate": rate, "steps": arguments.steps, "samples": arguments.samples, "split": arguments.split}
            if not any(about.items() <= row.items() for row in rows):
                rows.append({**about, **measured(subject, batches, case, rate, arguments.steps)})
                Console(stderr=True).print(rows[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def measured(subject: MiniLM, batches: Texts, case: str, rate: float, steps: int) -> dict[str, Any]:
    """How many numbers train, and what recovered() says."""
    model = subject.model.requires_grad_(True)
    model.embeddings.requires_grad_(False)
    both = {0: "batch", 1: "length"}
    dynamic = {"input_ids": both, "attention_mask": both}
    recipe = sc.Pipeline.parse(MASKS + CASES[case][0])
    module, hook = sc.attach(model, subject.batches[0], recipe, calibration=subject.batches, dynamic=dynamic)
    masks = {f"{path}.weight": int(mask.sum()) for path, mask in hook.masks.items()}
    numbers = sum(masks.get(name, one.numel()) for name, one in module.named_parameters() if one.requires_grad)
    return {"numbers": numbers, **recovered(subject, module, hook, batches, dynamic, steps=steps, rate=rate, losses=LOSSES)}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="MiniLM 2:4 on Brown")
    for name in ("what trains", "rate", "steps", "numbers", "cosine before", "cosine", "Lee before", "Lee"):
        table.add_column(name, justify="left" if name == "what trains" else "right")
    for row in rows:
        measures = (f"{row[when][key]:.3f}" for key in ("cosine Brown", "Pearson Lee") for when in ("before", "after"))
        table.add_row(row["case"], f"{row['rate']:g}", str(row["steps"]), f"{row['numbers'] / 1e6:.2f} M", *measures)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
