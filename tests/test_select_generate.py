"""Language models whose tokens select their inputs, inside transformers' generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.pipeline import Pipeline

transformers = pytest.importorskip("transformers")

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 5}, "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}
PASSES = ("select_inputs(density={density}, budget='greedy')", "select_neurons(density={density})")


def compiled(model: nn.Module, step: str, density: float) -> CompiledModel:
    """Bound to kernels wherever there are some, whether they pay or not."""
    data = [{"input_ids": torch.randint(1, 96, (2, 12))} for _ in range(2)]
    recipe = Pipeline.parse(f"{step.format(density=density)} | pack() | lower(margin=-1000.0, rounds=3)")
    return sc.compile(model, {"input_ids": torch.randint(1, 96, (2, 7))}, recipe=recipe, calibration=data,
                      dynamic={"input_ids": {0: "batch", 1: "tokens"}})


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    return tokens


@pytest.fixture(scope="module", params=PASSES, ids=["inputs", "neurons"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, CompiledModel]:
    model = llama(hidden_size=64, intermediate_size=128)
    return model, compiled(model, request.param, 1.0)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("batch", [1, 3])
def test_all_selected_generates_as_the_dense_model(pair: tuple[nn.Module, CompiledModel], way: str, batch: int) -> None:
    model, sparse = pair
    ids = torch.randint(1, 96, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if batch > 1:  # padded on the left
        ids[1, :4], mask[1, :4] = 0, 0
    assert torch.equal(generated(sparse, ids, mask, **WAYS[way]), generated(model, ids, mask, **WAYS[way]))


def test_streaming() -> None:
    model = llama(hidden_size=64, intermediate_size=128)
    sparse = compiled(model, PASSES[0], 1.0)
    seen: list[list[int]] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[name-defined,misc]
        def put(self, value: Tensor) -> None:
            seen.append(value.flatten().tolist())

        def end(self) -> None:
            seen.append([])

    ids = torch.tensor([[5, 6, 7]])
    tokens = generated(sparse, ids, torch.ones_like(ids), do_sample=False, streamer=Streamer())
    assert [token for part in seen for token in part] == tokens[0].tolist()
    assert seen[-1] == []


@pytest.mark.parametrize("step", PASSES)
def test_the_kernels_generate_as_the_plain_graphs_do(step: str) -> None:
    """At half density: prompt and tokens alike select, whatever the number of rows."""
    model = llama(hidden_size=64, intermediate_size=128)
    sparse = compiled(model, step, 0.5)
    plain = instantiate(sparse.program)  # the ops without their kernels
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.ones_like(ids)
    assert torch.equal(generated(sparse, ids, mask, do_sample=False), generated(plain, ids, mask, do_sample=False))
    chosen = [row for row in sparse.report().sites if row.structure != "dense"]
    assert chosen
    assert all(0 < row.density < 1 for row in chosen)


def test_under_torch_compile_tokens_of_a_static_cache_are_one_graph() -> None:
    model = llama(hidden_size=64, intermediate_size=128)
    sparse: Any = compiled(model, PASSES[0], 1.0)
    if not sparse.program.attentions:
        pytest.skip("no kernel of attention here")
    ids, mask = torch.randint(1, 96, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    ids[1, :4], mask[1, :4] = 0, 0
    made: list[Any] = []
    torch._dynamo.reset()

    def step(one: Any, token: Tensor, mask: Tensor, cache: Any) -> Tensor:
        places = (mask.cumsum(1) - 1)[:, -1:]
        logits: Tensor = one(input_ids=token, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True).logits
        return logits

    def watch(graph: Any, given: Any) -> Any:
        made.append(graph)
        return graph.forward

    traced = torch.compile(step, backend=watch)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=24) for _ in range(2)]
    with torch.no_grad():
        for one, cache in zip((model, sparse), caches, strict=True):
            one(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        for number in range(3):
            token, mask = torch.full((2, 1), number + 5), torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
            torch.testing.assert_close(traced(sparse, token, mask, caches[1]), step(model, token, mask, caches[0]), rtol=1e-4, atol=1e-4)
    assert len(made) <= 2, "one graph of the first length of the mask, and one of any"
