"""MiniLM recovered: a sparse sentence encoder trained on plain text to do what the dense one does.

    python benchmarks/recovery.py --brown FOLDER [--cases "2:4" ...] [--steps 900] [--samples 64] [--json FILE]

All linear layers of the encoder are cut; the recovery trains them, the biases and the norms (the embeddings are frozen) with sc.recover() on the
Brown files that are not held out, in batches of 32 × 64 tokens, in bfloat16 autocast. Cosine to the dense model's embeddings on held-out Brown texts
and Lee Pearson (subjects.py) are measured before the first and behind the last step; nothing is chosen by them: --split choose measures on other
texts, by which rate and losses were chosen. Settings are the same for all cases. The gradual cases start with the dense model. Cases that learn
masks (MaskLLM, Lottery Jackpots) train nothing else: the weights stay those of the dense model. A killed run goes on where it was (--checkpoints).

--speed measures nothing but time: 8 × 128 tokens through the encoder cut in each case's structure (by magnitude: which weights they are changes no
time), compiled in float32 and in bfloat16, against the dense model in both, eager and through torch.compile, in turns.
"""

from __future__ import annotations

import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from subjects import MiniLM, brown, options
from torch import Tensor

import sparsify_compiler as sc
from sparsify_compiler.measure import interleave
from sparsify_compiler.yardstick import dense_forms

ROWS, LENGTH = 32, 64
HESSIAN = "repair='obs', inputs='block'"
SCORE = "weight_times_input_norm"
LOSSES = ("squarehead", "outputs", "embeddings")


def gradual(steps: int, density: float, part: int) -> str:
    """From the dense model to blocks at a density in the first 1 / part of the steps."""
    end = steps // part
    return (f"mask_weights(score={SCORE!r}, structure='32x1', density={density})"
            f" | move_masks(sparsity='cubic(end={end})', drop={SCORE!r}, every=10, until={end})")


CASES = {  # of the number of steps
    "2:4": lambda steps: f"mask_weights(score='repair', structure=NM(n=2, m=4), {HESSIAN})",
    "32x1 50 %": lambda steps: f"mask_weights(score='repair', structure='32x1', density=0.5, {HESSIAN})",
    "32x1 80 %": lambda steps: f"mask_weights(score='repair', structure='32x1', density=0.2, {HESSIAN})",
    "32x1 50 %, gradual": lambda steps: gradual(steps, 0.5, 3),
    "32x1 80 %, gradual": lambda steps: gradual(steps, 0.2, 2),
    "2:4, MaskLLM from Wanda": lambda steps: f"mask_weights(score={SCORE!r}, structure='2:4') | learn_masks(until={steps})",
    "2:4, MaskLLM from magnitude": lambda steps: f"mask_weights(structure='2:4') | learn_masks(until={steps})",
    "2:4, Lottery Jackpots": lambda steps: f"mask_weights(structure='2:4') | learn_masks(chooser='top_k(power=0.0)', until={steps})",
    "2:4, Lottery Jackpots from Wanda":
        lambda steps: f"mask_weights(score={SCORE!r}, structure='2:4') | learn_masks(chooser='top_k(power=0.0)', until={steps})",
}


STRUCTURES = {"2:4": "structure='2:4'", "32x1 50 %": "structure='32x1', density=0.5", "32x1 80 %": "structure='32x1', density=0.2"}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, nargs="+", default=[900])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.set_defaults(samples=64)
    arguments = parser.parse_args()
    say = Console(stderr=True).print
    subject = MiniLM(arguments)
    if arguments.speed:
        timed(subject, [case for case in arguments.cases if case in STRUCTURES])
        return
    batches = batches_of(arguments)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for steps in arguments.steps:
        for case in arguments.cases:
            about = {"case": case, "steps": steps, "rate": arguments.rate, "losses": list(arguments.losses), "samples": arguments.samples,
                     "split": arguments.split}
            if not any(about.items() <= row.items() for row in rows):
                rows.append({**about, **measured(subject, batches, case, steps, arguments)})
                say(rows[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def measured(subject: MiniLM, batches: list[dict[str, Tensor]], case: str, steps: int, arguments: Any) -> dict[str, Any]:
    """Quality before and after, and the seconds of processor that the recovery took: None where an earlier process did a part of it."""
    model = subject.model.requires_grad_(True)
    model.embeddings.requires_grad_(False)
    both = {0: "batch", 1: "length"}
    dynamic = {"input_ids": both, "attention_mask": both}
    recipe = sc.Pipeline.parse(CASES[case](steps))
    module, hook = sc.attach(model, subject.batches[0], recipe, calibration=subject.batches, dynamic=dynamic)
    with torch.no_grad():
        before, spent = subject.measure(module), time.process_time()
    name = f"{case} {steps} {arguments.samples}.safetensors".replace(" ", "-")
    file = arguments.checkpoints / name if arguments.checkpoints else None
    whole = file is None or not file.exists()
    module, recovery = sc.recover(module, model, batches, hook=hook, minutes=600, steps=steps, rate=arguments.rate, losses=arguments.losses,
                                  dtype=torch.bfloat16, dynamic=dynamic, checkpoint=file, progress=True)
    spent = time.process_time() - spent
    with torch.no_grad():
        after = subject.measure(module)
    kept, total = (sum(count) for count in zip(*((int(mask.sum()), mask.numel()) for mask in hook.masks.values()), strict=True))
    return {"before": before, "after": after, "processor seconds": round(spent) if whole else None, "first loss": recovery.points[0].loss,
            "last loss": recovery.points[-1].loss, "density": kept / total}


def timed(subject: MiniLM, cases: list[str]) -> None:
    models = {"fp32": subject.model, "bf16": copy.deepcopy(subject.model).bfloat16()}
    with torch.inference_mode():
        forms = {name: form for model in models.values() for name, form in dense_forms(model, (), subject.timed, ("eager", "compile"))[0].items()}
        dense = list(forms)
        for case in cases:
            recipe = f"mask_weights(score='magnitude', {STRUCTURES[case]}) | pack() | lower()"
            made = {dtype: sc.compile(model, subject.timed, recipe=recipe) for dtype, model in models.items()}
            forms |= {f"{case}, {dtype}": partial(compiled, **subject.timed) for dtype, compiled in made.items()}
        timings = interleave(forms, rounds=21, at_most=15.0)
    best = min(dense, key=lambda name: timings[name].median)
    table = Table(title=f"MiniLM, 8 × 128 tokens, {torch.get_num_threads()} threads; the fastest dense form is {best}")
    for name in ("form", "ms", "quartiles", "fastest dense / this"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for name, found in timings.items():
        table.add_row(name, f"{found.median:.1f}", f"{found.low:.1f}-{found.high:.1f}", f"{timings[best].median / found.median:.2f}")
    Console(width=130).print(table)


def batches_of(arguments: Any) -> list[dict[str, Tensor]]:
    """All texts that are not held out, cut into pieces of LENGTH tokens, shuffled, in batches of ROWS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MiniLM.place(None, arguments.cache))  # type: ignore[arg-type]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    inner = LENGTH - 2
    pieces = []
    for text in brown(arguments.brown)[0]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [[first, *ids[i : i + inner], last] for i in range(0, len(ids) - inner, inner)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(pieces)[order][: len(pieces) // ROWS * ROWS]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(ROWS)]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="MiniLM recovered on Brown")
    for name in ("case", "steps", "density", "cosine before", "cosine", "Lee before", "Lee", "processor s"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        before, after = row["before"], row["after"]
        found = [f"{side[name]:.3f}" if name in side else "" for name in ("cosine Brown", "Pearson Lee") for side in (before, after)]
        table.add_row(row["case"], str(row["steps"]), f"{row['density']:.3f}", *found, str(row["processor seconds"] or "resumed"))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
