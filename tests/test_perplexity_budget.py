"""As sparse as lets the perplexity of the calibration rise by so much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sparsify_compiler as sc
from sparsify_compiler.errors import BudgetError, CalibrationError
from sparsify_compiler.passes.activation.budgets.equal_error import equal_error
from sparsify_compiler.quality import perplexity


class Words(nn.Module):
    """A language model of one FFN, which knows what follows each word."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down, self.head = nn.Embedding(16, 32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        logits: Tensor = self.head(x + self.down(nn.functional.gelu(self.up(x))))
        return logits


def trained() -> tuple[nn.Module, list[tuple[Tensor]]]:
    model, order = Words(), torch.randperm(16)
    data = [(torch.stack([order.roll(-i)[:12] for i in range(16)]),)]
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        adam.zero_grad()
        cross_entropy(model(*data[0])[:, :-1].flatten(0, 1), data[0][0][:, 1:].flatten()).backward()
        adam.step()
    return model.eval(), data


def test_perplexity_counts_every_token_alike_and_no_padding() -> None:
    model = Words().eval()
    long, short = torch.randint(0, 16, (2, 9)), torch.randint(0, 16, (1, 3))
    with torch.no_grad():
        losses = [cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none") for ids in (long, short)]
    assert perplexity(model, [(long,), (short,)]) == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)

    class Masked(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return model(input_ids)

    mask = torch.ones_like(long)
    mask[0, 4:] = 0
    kept = losses[0].view(2, 8)[mask[:, 1:] == 1]
    assert perplexity(Masked(), [{"input_ids": long, "attention_mask": mask}]) == pytest.approx(float(kept.mean().exp()), rel=1e-5)
    assert perplexity(model, [(long,)], lambda output, batch: output.new_tensor(2.0)) == pytest.approx(7.389, rel=1e-3)


def test_what_has_no_perplexity_says_so() -> None:
    with pytest.raises(CalibrationError, match="no output is logits"):
        perplexity(nn.Linear(3, 3), [(torch.randn(2, 3),)])
    with pytest.raises(CalibrationError, match="no token"):
        perplexity(nn.Linear(3, 3), [])
    with pytest.raises(BudgetError):
        sc.Budget(perplexity_rise=-0.1)
    with pytest.raises(BudgetError):
        sc.Budget(perplexity_rise=0.1, density=0.5)


@pytest.mark.parametrize("recipe", ["sparsing_law", "teal"])
def test_the_sparsest_model_within_the_rise_is_taken(recipe: str) -> None:
    model, data = trained()
    options: dict[str, Any] = {"recipe": recipe, "calibration": data, "against": ("eager",)}
    loose, tight = (sc.compile(model, data[0], budget=sc.Budget(perplexity_rise=rise), **options) for rise in (0.5, 0.02))
    dense = perplexity(model, data)
    assert perplexity(loose, data) <= 1.5 * dense * 1.001
    assert perplexity(tight, data) <= 1.02 * dense * 1.001
    budgets = [min(row.budget for row in compiled.report().sites) for compiled in (loose, tight)]
    assert budgets[0] < budgets[1]


def test_a_language_model_captured_in_parts() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(1, 96, (2, 12))} for _ in range(2)]
    compiled = sc.compile(model, data[0], recipe="sparsing_law", budget=sc.Budget(perplexity_rise=1e-6), calibration=data,
                          dynamic={"input_ids": {0: "batch", 1: "tokens"}})
    assert perplexity(compiled, data) <= perplexity(model, data) * (1 + 1e-4)
    assert compiled.generate(data[0]["input_ids"], max_new_tokens=2).shape == (2, 14)


def test_layers_share_one_error() -> None:
    curves = {"a": torch.linspace(0, 1, 21), "b": torch.linspace(0, 1, 21).square()}

    class Known:
        def errors(self, site: str) -> Tensor:
            return curves[site]

    found = equal_error({"a": 100, "b": 300}, 0.5, Known())  # type: ignore[arg-type]
    assert 100 * found["a"] + 300 * found["b"] == pytest.approx(200, rel=1e-3)
    assert 1 - found["a"] == pytest.approx((1 - found["b"]) ** 2, abs=0.01)
