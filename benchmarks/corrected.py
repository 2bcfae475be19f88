"""What correction by the dense model gives back: SmolLM2 writes greedily with a part of its neurons, beside the dense model.

    python benchmarks/corrected.py --brown FOLDER [--sparsity 50] [--prompts 8] [--tokens 48]

Prompts are the first 64 tokens of held-out Brown texts (subjects.py). "same" is the share of positions at which the dense model's own greedy text has
the same token; "accepted" the share of the sparse model's proposals that the dense model let stand; "dense calls" how often the dense model ran for
each new token. A row is a period and what share of the likeliest token's probability is accepted (sc.generate_corrected).
"""

from __future__ import annotations

from typing import Any

import subjects as language
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate

CASES = ((2, 1.0), (4, 1.0), (8, 1.0), (4, 0.3), (8, 0.3), (16, 0.3), (16, 0.0))


def main() -> None:
    parser = language.options(__doc__)
    parser.add_argument("--sparsity", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    subject = language.SmolLM2(arguments)
    dynamic = {"input_ids": {0: "batch", 1: "tokens"}}
    subject.batches = [{"input_ids": batch["input_ids"]} for batch in subject.batches]
    subject.capture(dynamic)
    sparse = instantiate(subject.prune(sc.recipes.sirius(1 - arguments.sparsity / 100)))
    prompts = [text[None, :64] for text in subject.texts["Brown"][: arguments.prompts]]
    dense = [written(subject.model, prompt, arguments.tokens) for prompt in prompts]
    table = Table(title=f"SmolLM2, {arguments.sparsity} % of the neurons of every FFN skipped by the gate")
    for column in ("period", "accept", "same", "accepted", "dense calls"):
        table.add_column(column, justify="right")
    alone = [written(sparse, prompt, arguments.tokens) for prompt in prompts]
    table.add_row("never", "", f"{same(alone, dense):.2f}", "", "0")
    for period, accept in CASES:
        found = [sc.generate_corrected(sparse, subject.model, prompt, max_new_tokens=arguments.tokens, period=period, accept=accept, eos_token_id=[])
                 for prompt in prompts]
        proposed, accepted = sum(one.proposed for one in found), sum(one.accepted for one in found)
        made = sum(one.tokens.shape[1] - 64 for one in found)
        table.add_row(str(period), f"{accept:g}", f"{same([one.tokens for one in found], dense):.2f}", f"{accepted / proposed:.2f}",
                      f"{(made - accepted) / made:.2f}")
    Console(width=130).print(table)


def written(model: nn.Module | Any, prompt: Tensor, count: int) -> Tensor:
    """Greedy, to the end."""
    return sc.generate_corrected(model, model, prompt, max_new_tokens=count, period=1, eos_token_id=[]).tokens


def same(found: list[Tensor], dense: list[Tensor]) -> float:
    """Share of new tokens that are the dense model's."""
    equal = torch.cat([(one == other)[0, 64:] for one, other in zip(found, dense, strict=True)])
    return float(equal.float().mean())


if __name__ == "__main__":
    main()
