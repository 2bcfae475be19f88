"""MiniLM recovered: a sparse sentence encoder trained on plain text to do what the dense one does.

    python benchmarks/recovery.py --brown FOLDER [--cases "2:4" ...] [--steps 900] [--rows 32] [--samples 64] [--texts moved] [--json FILE]

All linear layers of the encoder are cut; the recovery trains them, the biases and the norms (the embeddings are frozen) with sc.recover() on the
Brown files that are not held out, in batches of 32 × 64 tokens (--rows), in bfloat16 autocast. Cosine to the dense model's embeddings on
held-out Brown texts and Lee Pearson (subjects.py) are measured before the first and behind the last step; nothing is chosen by them: --split choose
measures on other texts, by which rate and losses were chosen. Settings are the same for all cases. The gradual cases start with the dense model.
Cases that learn masks (MaskLLM, Lottery Jackpots) train nothing else: the weights stay those of the dense model. A killed run goes on where it
was (--checkpoints).

--speed measures nothing but time: 8 × 128 tokens through the encoder cut in each case's structure (by magnitude: which weights they are changes no
time), compiled in float32 and in bfloat16, against the dense model in both, eager and through torch.compile, in turns.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from subjects import MiniLM, Subject, brown, options
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.measure import interleave
from sparsify_compiler.training import Hook
from sparsify_compiler.yardstick import dense_forms

LENGTH, ROWS = 64, 32
HESSIAN = "repair='obs', inputs='block'"
ALIGNED = "score='repair', repair='aligned', inputs='pruned'"
SHARED = f"{ALIGNED}, budget='curvature', structure='32x1'"
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
    "32x1 50 %, curvature": lambda steps: f"mask_weights(score='repair', budget='curvature', structure='32x1', density=0.5, {HESSIAN})",
    "32x1 50 %, permuted": lambda steps: (f"permute_channels(score={SCORE!r}, structure='32x1', density=0.5, rounds=12)"
                                          f" | mask_weights(score='repair', structure='32x1', density=0.5, {HESSIAN})"),
    "2:4, aligned": lambda steps: f"mask_weights({ALIGNED}, structure='2:4')",
    "32x1 50 %, aligned": lambda steps: f"mask_weights({SHARED}, density=0.5)",
    "32x1 80 %, aligned": lambda steps: f"mask_weights({SHARED}, density=0.2)",
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
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--texts", choices=("same", "moved", "varied"), default="same")
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
    batches = Texts(arguments, arguments.rows, arguments.texts)
    rows: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for steps in arguments.steps:
        for case in arguments.cases:
            about = {"case": case, "steps": steps, "rate": arguments.rate, "losses": list(arguments.losses), "samples": arguments.samples,
                     "rows": arguments.rows, "split": arguments.split, "texts": arguments.texts}
            if not any(about.items() <= row.items() for row in rows):
                rows.append({**about, **measured(subject, batches, case, steps, arguments)})
                say(rows[-1])
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def measured(subject: MiniLM, batches: Texts, case: str, steps: int, arguments: Any) -> dict[str, Any]:
    """The encoder cut, and recovered."""
    model = subject.model.requires_grad_(True)
    model.embeddings.requires_grad_(False)
    both = {0: "batch", 1: "length"}
    dynamic = {"input_ids": both, "attention_mask": both}
    recipe = sc.Pipeline.parse(CASES[case](steps))
    module, hook = sc.attach(model, subject.batches[0], recipe, calibration=subject.batches, dynamic=dynamic)
    name = f"{case} {steps} {arguments.rows} {arguments.samples} {arguments.texts}.safetensors".replace(" ", "-")
    file = arguments.checkpoints / name if arguments.checkpoints else None
    return recovered(subject, module, hook, batches, dynamic, file, steps=steps, rate=arguments.rate, losses=arguments.losses)


def recovered(subject: Subject, module: nn.Module, hook: Hook, batches: Iterable[dict[str, Any]], dynamic: dict[str, dict[int, str]],
              checkpoint: Path | None = None, **training: Any) -> dict[str, Any]:
    """Quality before and behind sc.recover(), the seconds of processor that it took (None where an earlier process did a part of it), the first and
    last loss, and the share of the weights that the masks keep.
    """
    with torch.no_grad():
        before, spent = subject.measure(module), time.process_time()
    whole = checkpoint is None or not checkpoint.exists()
    module, recovery = sc.recover(module, subject.model, batches, hook=hook, minutes=600, dtype=torch.bfloat16, dynamic=dynamic,
                                  checkpoint=checkpoint, progress=True, **training)
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


class Texts:
    """All texts that are not held out, cut into pieces of LENGTH tokens, shuffled, in batches of `rows`.

    texts   "same": the pieces are the same every time that they are walked over. "moved": each time they begin somewhere else. "varied": half of them
            do, half are made of sentences from anywhere; and in half of all a token in seven is another one, drawn as often as the texts have it
    """

    def __init__(self, arguments: Any, rows: int = ROWS, texts: str = "same") -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(MiniLM.place(None, arguments.cache))  # type: ignore[arg-type]
        self._ends = set(tokenizer.convert_tokens_to_ids(list(".?!")))
        self._first, self._last = tokenizer.cls_token_id, tokenizer.sep_token_id
        self._texts = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in brown(arguments.brown, arguments.split)[0]]
        self._sentences = [sentence for text in self._texts for sentence in self._cut(text)]
        self._all = torch.tensor([token for text in self._texts for token in text])
        self._rows, self._moved, self._varied, self._walks = rows, texts != "same", texts == "varied", 0

    def _cut(self, text: list[int]) -> Iterator[list[int]]:
        begin = 0
        for place, token in enumerate(text):
            if token in self._ends:
                yield text[begin : place + 1]
                begin = place + 1

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._walks += self._moved
        chance, generator = random.Random(self._walks), torch.Generator().manual_seed(self._walks)
        ids = torch.tensor([[self._first, *piece, self._last] for piece in self._pieces(chance)])
        ids = ids[torch.randperm(len(ids), generator=generator)][: len(ids) // self._rows * self._rows]
        if self._varied:
            ids = self._replaced(ids, generator)
        return iter([{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(self._rows)])

    def _pieces(self, chance: random.Random) -> list[list[int]]:
        inner, pieces = LENGTH - 2, []
        for text in self._texts:
            start = chance.randrange(inner) if self._moved else 0
            pieces += [text[i : i + inner] for i in range(start, len(text) - inner, inner)]
        if not self._varied:
            return pieces
        chance.shuffle(pieces)
        return [*pieces[::2], *(self._mixed(chance, inner) for _ in pieces[1::2])]

    def _mixed(self, chance: random.Random, length: int) -> list[int]:
        found: list[int] = []
        while len(found) < length:
            found += chance.choice(self._sentences)
        return found[:length]

    def _replaced(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        hit = torch.rand(ids.shape, generator=generator, dtype=torch.float32) < torch.rand(len(ids), 1, generator=generator).gt(0.5) / 7
        hit[:, 0] = hit[:, -1] = False
        return torch.where(hit, self._all[torch.randint(len(self._all), ids.shape, generator=generator)], ids)


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
