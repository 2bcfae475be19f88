"""Dense FFNs that became experts, before and after a short distillation, against the same with the oracle router.

    python benchmarks/experts_recovery.py --brown FOLDER [--model minilm smollm2] [--densities 0.75 0.5 0.375] [--routing frozen agreement ...]
                                          [--steps 200] [--rate 2e-4] [--rows 16] [--json FILE] [--split choose]

FFNs are divided by recipes.fitted_experts(), without training; sc.recover() then distils the dense model on the Brown files that are not
held out, MiniLM in batches of 8 × 64 tokens, SmolLM2 of 2 × 256, and all but the embeddings is trained. `routing` is how routers learn: "frozen" has
routers as they were fitted, since weights of 1 give them no gradient; the others are in ROUTING. The bound is the oracle router, which computes every
expert to choose: before, and trained for as many steps. "lost" is (router - oracle) / (oracle - dense), of the cosine or the perplexity's logarithm.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import subjects
import torch
from experts_quality import MODELS, loss_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sparsify_compiler as sc

SPLIT = "split_experts(experts={experts}, partition='coactivation_graph', router={router!r}, shared=0.25, repair='least_squares', density={density})"
ROUTING = {
    "frozen": "",
    "straight through": " | route_gradients()",
    "agreement": " | penalise_routing(loss='agreement', weight=1.0)",
    "both": " | route_gradients() | penalise_routing(loss='agreement', weight=1.0)",
}
PIECES = {"minilm": (8, 64), "smollm2": (2, 256)}  # rows and tokens of a batch
LOSSES = {"minilm": ("squarehead", "outputs", "embeddings"), "smollm2": ("squarehead", "logits")}


def main() -> None:
    parser = subjects.options(__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.75, 0.5, 0.375])
    parser.add_argument("--routing", nargs="+", default=list(ROUTING), choices=list(ROUTING))
    parser.add_argument("--bound", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--rows", type=int, help="of a batch, in place of 8 and 2")
    parser.add_argument("--texts", type=int, default=subjects.MEASURED)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(samples=32)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for model in arguments.model:
        subject, batches = None, None
        for density in arguments.densities:
            for router, routing in [*[("oracle", "frozen")] * arguments.bound, *(("ridge", routing) for routing in arguments.routing)]:
                about = {"model": model, "density": density, "router": router, "routing": routing, "experts": arguments.experts,
                         "steps": arguments.steps, "rate": arguments.rate, "samples": arguments.samples, "split": arguments.split,
                         "rows": arguments.rows or PIECES[model][0]}
                if not any(about.items() <= row.items() for row in rows):
                    subject = subject or subject_of(model, arguments)
                    batches = batches or batches_of(subject, model, arguments)
                    rows.append({**about, **measured(subject, batches, about)})
                    Console(stderr=True).print(rows[-1])
                    if arguments.json:
                        arguments.json.write_text(json.dumps(rows, indent=1))
    for model in arguments.model:
        show(model, [row for row in rows if row["model"] == model])


def subject_of(model: str, arguments: Any) -> subjects.Subject:
    subject = MODELS[model](arguments)
    if isinstance(subject, subjects.SmolLM2):
        subject.texts = {name: text[: arguments.texts] for name, text in subject.texts.items()}
    return subject


def measured(subject: subjects.Subject, batches: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Quality of the dense model, before and after, and the seconds that the distillation took."""
    model = subject.model.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    recipe = SPLIT.format(**about) + ROUTING[about["routing"]]
    dynamic = {name: {0: "batch", 1: "length"} for name, value in subject.batches[0].items() if isinstance(value, Tensor)}
    module, hook = sc.attach(model, subject.batches[0], recipe, calibration=subject.batches, dynamic=dynamic)
    with torch.no_grad():
        before, dense = subject.measure(module), subject.measure(model)
    started = time.perf_counter()
    module, recovery = sc.recover(module, model, batches, hook=hook, minutes=600, steps=about["steps"], rate=about["rate"],
                                  losses=LOSSES[about["model"]], dynamic=dynamic)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        after = subject.measure(module)
    return {"dense": dense, "before": before, "after": after, "seconds": round(seconds), "first loss": recovery.points[0].loss,
            "last loss": recovery.points[-1].loss}


def batches_of(subject: subjects.Subject, model: str, arguments: Any) -> list[dict[str, Any]]:
    """All texts that are not measured, cut into pieces, shuffled, in batches."""
    from transformers import AutoTokenizer

    rows, length = arguments.rows or PIECES[model][0], PIECES[model][1]
    place = subject.place(None) if isinstance(subject, subjects.MiniLM) else subject.model.config._name_or_path  # type: ignore[union-attr]
    tokenizer = AutoTokenizer.from_pretrained(place)
    ends = [[token] if token is not None and model == "minilm" else [] for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    inner = length - len(ends[0]) - len(ends[1])
    pieces = []
    for text in subjects.brown(arguments.brown, arguments.split)[0]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [[*ends[0], *ids[i : i + inner], *ends[1]] for i in range(0, len(ids) - inner, inner)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    whole = torch.tensor(pieces)[order][: len(pieces) // rows * rows]
    rest: dict[str, Any] = {"use_cache": False} if model == "smollm2" else {}
    return [{"input_ids": ids, **(rest or {"attention_mask": torch.ones_like(ids)})} for ids in whole.split(rows)]


def show(model: str, rows: list[dict[str, Any]]) -> None:
    measures = list(rows[0]["dense"])
    table = Table(title=f"{model}, {rows[0]['steps']} steps; dense " + ", ".join(f"{name} {rows[0]['dense'][name]:.4g}" for name in measures))
    for column in ("density", "router", *(f"{name} {when}" for name in measures for when in ("before", "after")), "lost before", "lost after", "s"):
        table.add_column(column, justify="left" if column == "router" else "right")
    for row in rows:
        best = next((one for one in rows if one["router"] == "oracle" and one["density"] == row["density"]), row)
        lost = []
        for when in ("before", "after"):
            base, bound, own = (loss_of(values, measures[-1]) for values in (row["dense"], best[when], row[when]))
            lost.append("-" if best is row else f"{(own - bound) / max(bound - base, 1e-9):.2f}")
        quality = [f"{row[when][name]:.4g}" for name in measures for when in ("before", "after")]
        name = "oracle" if row["router"] == "oracle" else f"ridge, {row['routing']}"
        table.add_row(str(row["density"]), name, *quality, *lost, str(row["seconds"]))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
