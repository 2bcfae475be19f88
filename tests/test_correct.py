"""A sparse language model's tokens, corrected by the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import InputError
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A dense model, and one that selects so few neurons that it writes something else."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=96,
                                      initializer_range=0.5)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(1, 96, (2, 12))}]
    ctx = Context(batches=data)
    ctx.calibrate = lambda program, needs: calibrate(program, data, needs, cache=False)
    captured = sc.capture(model, data[0], {"input_ids": {0: "batch", 1: "tokens"}})
    return model, instantiate(Pipeline.parse("sirius(density=0.2)").run(captured, ctx, ()))


def prompt(batch: int, padded: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 96, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


def greedy(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return tokens


@pytest.mark.parametrize("period", [1, 2, 5, 30])
@pytest.mark.parametrize(("batch", "padded"), [(1, False), (3, False), (3, True)])
def test_full_acceptance_is_the_dense_models_greedy_output(pair: tuple[nn.Module, nn.Module], period: int, batch: int, padded: bool) -> None:
    model, sparse = pair
    ids, mask = prompt(batch, padded)
    found = sc.generate_corrected(sparse, model, ids, mask, max_new_tokens=17, period=period)
    assert torch.equal(found.tokens, greedy(model, ids, mask, 17))
    assert (found.proposed == 0) == (period == 1)
    assert 0 <= found.accepted <= found.proposed


def test_the_sparse_model_writes_something_else_and_is_corrected(pair: tuple[nn.Module, nn.Module]) -> None:
    model, sparse = pair
    ids, mask = prompt(1, False)
    assert not torch.equal(greedy(sparse, ids, mask, 17), greedy(model, ids, mask, 17))
    strict = sc.generate_corrected(sparse, model, ids, mask, max_new_tokens=17, period=4)
    assert strict.accepted < strict.proposed
    loose = sc.generate_corrected(sparse, model, ids, mask, max_new_tokens=17, period=4, accept=0.0)
    assert loose.accepted == loose.proposed
    assert loose.tokens.shape == (1, 26)


def test_a_dense_model_accepts_itself(pair: tuple[nn.Module, nn.Module]) -> None:
    model, _ = pair
    ids, mask = prompt(2, True)
    found = sc.generate_corrected(model, model, ids, mask, max_new_tokens=16, period=5)
    assert found.accepted == found.proposed > 0


def test_rows_end_and_are_padded_as_generate_does(pair: tuple[nn.Module, nn.Module]) -> None:
    model, sparse = pair
    ids, mask = prompt(3, False)
    written = greedy(model, ids, mask, 17)
    end = int(written[1, 12])
    expected: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=17, do_sample=False, eos_token_id=end)  # type: ignore[operator]
    assert torch.equal(sc.generate_corrected(sparse, model, ids, mask, max_new_tokens=17, period=4, eos_token_id=end).tokens, expected)
    one = sc.generate_corrected(sparse, model, ids[1:2], max_new_tokens=17, period=4, eos_token_id=[end, 95]).tokens
    assert int(one[0, -1]) == end or one.shape[1] == 26


def test_a_compiled_model_writes(pair: tuple[nn.Module, nn.Module]) -> None:
    model, _ = pair
    ids, mask = prompt(1, False)
    recipe = Pipeline.parse("sirius(density=0.5) | pack() | lower(margin=-1000.0, rounds=3)")
    compiled = sc.compile(model, {"input_ids": ids}, recipe=recipe, calibration=[{"input_ids": ids}],
                          dynamic={"input_ids": {0: "batch", 1: "tokens"}})
    assert torch.equal(sc.generate_corrected(compiled, model, ids, mask, max_new_tokens=12, period=4).tokens, greedy(model, ids, mask, 12))


def test_bad_input_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    model, sparse = pair
    ids, _ = prompt(1, False)
    assert torch.equal(sc.generate_corrected(sparse, model, ids, max_new_tokens=0).tokens, ids)
    for wrong in ({"period": 0}, {"accept": 1.5}, {"max_new_tokens": -1}, {"attention_mask": torch.ones(2, 9)}):
        with pytest.raises(InputError):
            sc.generate_corrected(sparse, model, ids, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs"):
        sc.generate_corrected(sparse, model, ids[0])
