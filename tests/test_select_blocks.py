"""select_blocks on whole models: encoders captured whole, language models whose attention stays eager Python, inside generate()."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import key_sums
from sparsify_compiler.artefact_skeleton import check_attentions
from sparsify_compiler.block_layout import every_key
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ArtefactError, ModelError, SelectorError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.library_attention import find_library_attentions, give_indexers
from sparsify_compiler.measure import Timing
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.lower import _attention, _dense_attention
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.target import host

transformers = pytest.importorskip("transformers")

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 5}, "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"}, "no cache": {"do_sample": False, "use_cache": False},
}
DENSE = "select_blocks(always=(SlidingWindow(window=1000),), block_q=4, block_k=4)"
SPARSE = "select_blocks(always=(SlidingWindow(window=6), Sinks(tokens=2)), block_q=4, block_k=4)"


def rewritten(model: nn.Module, text: str, inputs: dict[str, Tensor] | tuple[Tensor, ...], dynamic: Any = None) -> CompiledModel:
    program = Pipeline.parse(text).run(capture(model, inputs, dynamic), Context())
    return CompiledModel(program)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    model, prompt = llama(), {"input_ids": torch.randint(1, 96, (2, 12))}
    program = capture(model, prompt, {"input_ids": {0: "batch", 1: "tokens"}})
    made = {name: CompiledModel(Pipeline.parse(text).run(program, Context())) for name, text in (("dense", DENSE), ("sparse", SPARSE))}
    return {"model": model, **made}


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    return tokens


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("batch", [1, 3])
def test_all_blocks_generate_as_the_dense_model(models: dict[str, nn.Module], way: str, batch: int) -> None:
    ids = torch.randint(1, 96, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[1, :4], mask[1, :4] = 0, 0
    both = [generated(models[name], ids, mask, **WAYS[way]) for name in ("model", "dense")]
    assert torch.equal(*both)


def test_decoding_continues_what_the_prompt_began(models: dict[str, nn.Module]) -> None:
    ids = torch.randint(1, 96, (1, 30))
    with torch.no_grad():
        whole = models["sparse"](input_ids=ids).logits
        step = models["sparse"](input_ids=ids[:, :11], use_cache=True)
        logits = [step.logits]
        for start, stop in ((11, 17), *((i, i + 1) for i in range(17, 30))):  # a chunk of the prompt, then tokens
            step = models["sparse"](input_ids=ids[:, start:stop], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-5, atol=1e-5)
    assert (whole - models["model"](input_ids=ids).logits).abs().max() > 1e-2


def test_padding_on_the_left_changes_nothing(models: dict[str, nn.Module]) -> None:
    ids = torch.randint(1, 96, (1, 20))
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), ids), 1)
    both = torch.cat((padded, torch.randint(1, 96, (1, 27))))
    mask = torch.ones_like(both)
    mask[0, :7] = 0
    with torch.no_grad():
        alone, together = models["sparse"](input_ids=ids).logits, models["sparse"](input_ids=both, attention_mask=mask).logits
    torch.testing.assert_close(together[:1, 7:], alone, rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_users_own_is_kept(models: dict[str, nn.Module]) -> None:
    ids = torch.randint(1, 96, (1, 10))
    mask = (torch.rand(1, 1, 10, 10, dtype=torch.float32) < 0.5) | torch.eye(10, dtype=torch.bool)
    with torch.no_grad():
        expected, found = (models[name](input_ids=ids, attention_mask=mask).logits for name in ("model", "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_users_model_stays_as_it_was(models: dict[str, nn.Module]) -> None:
    assert models["model"].config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert not any(hasattr(module, "_sparsify_indexer") for module in models["model"].modules())


def test_some_attentions_only() -> None:
    model, prompt = llama(), {"input_ids": torch.randint(1, 96, (1, 20))}
    one = rewritten(model, SPARSE.replace(", block_q", ", ignore=('*.1.self_attn',), block_q", 1), prompt)
    assert list(one.program.attentions) == ["model.layers.0.self_attn"]
    none = rewritten(model, DENSE.replace(", block_q", ", ignore=('*.1.self_attn',), block_q", 1), prompt)
    with torch.no_grad():
        torch.testing.assert_close(none(**prompt).logits, model(**prompt).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(SelectorError, match="none of 2 sites"):
        rewritten(model, DENSE.replace(", block_q", ", targets=('*.7.self_attn',), block_q", 1), prompt)


def test_saves_and_loads(models: dict[str, nn.Module], tmp_path: Path) -> None:
    models["sparse"].save(tmp_path / "out")  # type: ignore[operator]
    again = sc.load(tmp_path / "out", model=llama())
    ids = torch.randint(1, 96, (1, 20))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, models["sparse"](input_ids=ids).logits)


def test_attentions_that_cannot_choose_say_why() -> None:
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                                        num_attention_heads=4, num_key_value_heads=2, sliding_window=4)).eval()
    ctx = Context()
    program = Pipeline.parse(SPARSE).run(capture(mistral, {"input_ids": torch.randint(1, 96, (1, 9))}), ctx)
    assert not program.attentions
    assert [str(miss) for miss in ctx.misses] == ["at model.layers.0.self_attn: it reads a window of 4 tokens already"]
    ctx = Context()
    Pipeline.parse(SPARSE).run(capture(nn.Linear(2, 2).eval(), (torch.randn(1, 2),)), ctx)
    assert "no attention" in str(ctx.misses[0])


class Attention(nn.Module):
    """One attention of its inputs, in whatever way."""

    def __init__(self, shape: tuple[int, ...], keys: int, **given: Any) -> None:
        super().__init__()
        self.shape, self.keys, self.given = shape, keys, given

    def forward(self, x: Tensor) -> Tensor:
        query, key = x.view(self.shape), x.view(self.shape)[..., :self.keys, :]
        return nn.functional.scaled_dot_product_attention(query, key, key, **self.given)


@pytest.mark.parametrize(("shape", "keys", "given", "why"), [
    ((2, 6, 8), 6, {}, "its queries have 3 dimensions"),
    ((1, 2, 6, 8), 6, {"dropout_p": 1e-12}, "it drops shares at random"),
    ((1, 2, 6, 8), 4, {"is_causal": True}, "queries and keys of different lengths"),
])
def test_attentions_of_graphs_that_cannot_choose_say_why(shape: tuple[int, ...], keys: int, given: dict[str, Any], why: str) -> None:
    ctx = Context()
    program = Pipeline.parse(SPARSE).run(capture(Attention(shape, keys, **given).eval(), (torch.randn(96),)), ctx)
    assert why in str(ctx.misses[0])
    assert not any(node.target is attend.op for _, node in program.nodes())


def test_shared_keys_stay_shared_where_blocks_never_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            query, key = x.view(1, 4, 6, 8), x.view(1, 4, 6, 8)[:, :2]
            return nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    monkeypatch.setattr(_attention, "_times", lambda *given: {"dense": Timing(1.0, 1.0, 1.0), "blocks": Timing(2.0, 2.0, 2.0)})
    model, x = Grouped().eval(), torch.randn(192)
    program = Pipeline.parse(f"{SPARSE} | pack() | lower(rounds=1)").run(capture(model, (x,)), Context(target=host(), kernels=runtime))
    assert not any(node.target is attend.op for _, node in program.nodes())
    torch.testing.assert_close(instantiate(program)(x), model(x))


def test_limits_that_are_given_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(_attention, "_measured", lambda *given: measured.append(given))
    model, ctx = llama(), Context(target=host(), kernels=runtime)
    given = SPARSE.replace("block_q=4", "dense_below=7, block_q=4")
    program = Pipeline.parse(f"{given} | pack() | lower(rounds=1)").run(capture(model, {"input_ids": torch.randint(1, 96, (1, 20))}), ctx)
    assert not measured
    assert {Indexer.parse(text).dense_below for text in program.attentions.values()} == {7}


@pytest.mark.parametrize("way", ["greedy", "static cache"])
def test_layers_with_a_window_of_their_own_keep_it_beside_others(way: str) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, sliding_window=4, use_sliding_window=True, pad_token_id=0, eos_token_id=96,
                                      layer_types=["full_attention", "sliding_attention"], max_position_embeddings=64)
    model, ids = transformers.Qwen2ForCausalLM(config).eval(), torch.randint(1, 96, (1, 9))
    dense = rewritten(model, DENSE, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "tokens"}})
    assert list(dense.program.attentions) == ["model.layers.0.self_attn"]
    assert torch.equal(*(generated(one, ids, torch.ones_like(ids), **WAYS[way]) for one in (model, dense)))


def test_an_artefact_for_another_model_is_refused() -> None:
    with pytest.raises(ArtefactError, match=r"no attention at 'model\.elsewhere'"):
        check_attentions({"model.elsewhere": "Indexer(always=(Sinks(tokens=1),))"}, llama())


def test_what_a_registry_call_cannot_do_is_refused(models: dict[str, nn.Module]) -> None:
    from sparsify_compiler.library_attention import _attention

    x = torch.zeros(1, 2, 3, 4, dtype=torch.float32)
    with pytest.raises(ModelError, match="capped"):
        _attention(nn.Identity(), x, x, x, None, softcap=30.0)


class Encoder(nn.Module):
    """Bidirectional attention with a padding mask, as BERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        keep = mask.bool()[:, None, None].expand(-1, 1, x.shape[1], -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)


def test_a_captured_encoder_keeps_its_padding_mask_and_trains() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x, mask = torch.randn(2, 21, 16), torch.ones(2, 21, dtype=torch.long)
    mask[0, 15:] = 0
    dynamic = {"x": {0: "batch", 1: "tokens"}, "mask": {0: "batch", 1: "tokens"}}
    dense = rewritten(model, DENSE, (x, mask), dynamic)
    torch.testing.assert_close(dense(x, mask)[:, :15], model(x, mask)[:, :15], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(x[:1, :9], mask[:1, :9]), model(x[:1, :9], mask[:1, :9]), rtol=1e-5, atol=1e-5)
    trained = instantiate(dense.program)
    gradients = [torch.autograd.grad(m(x, mask)[:, :15].square().sum(), list(m.parameters())) for m in (trained, model)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_runs_under_torch_compile_and_export() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x, mask = torch.randn(1, 21, 16), torch.ones(1, 21, dtype=torch.long)
    sparse = rewritten(model, SPARSE, (x, mask))
    expected = sparse(x, mask)
    torch.testing.assert_close(torch.compile(sparse, backend="aot_eager", fullgraph=True)(x, mask), expected)
    exported = torch.export.export(sparse, (x, mask), strict=False)
    assert any("attend" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x, mask), expected)


@pytest.mark.parametrize(("wins", "below"), [((), _attention.NEVER), ((512,), 512), ((256, 512), 0), ((256,), _attention.NEVER)])
def test_lowering_measures_from_which_length_on_blocks_pay(monkeypatch: pytest.MonkeyPatch, wins: tuple[int, ...], below: int) -> None:
    def times(kind: Any, tensors: tuple[Tensor, ...], learned: tuple[Tensor, ...], rounds: int) -> dict[str, Timing]:
        return {"dense": Timing(1.0, 1.0, 1.0), "blocks": Timing(*(3 * (0.5 if tensors[1].shape[2] in wins else 2.0,)))}

    monkeypatch.setattr(_attention, "PROMPTS", (256, 512))
    monkeypatch.setattr(_attention, "CACHES", (256, 512))
    monkeypatch.setattr(_attention, "_times", times)
    model, prompt, ctx = llama(), {"input_ids": torch.randint(1, 96, (1, 20))}, Context(target=host(), kernels=runtime)
    program = Pipeline.parse(f"{SPARSE} | pack() | lower(rounds=1)").run(capture(model, prompt), ctx)
    rows = [program.decisions[f"model.layers.{i}.self_attn"] for i in (0, 1)]
    if below == _attention.NEVER:
        assert not program.attentions
        assert "never, slower than dense at every length" in rows[0].reason
        assert rows[0].format == rows[1].format == "dense"
    else:
        indexers = [Indexer.parse(text) for text in program.attentions.values()]
        assert [(i.dense_below, i.dense_below_decoding) for i in indexers] == [(below, below)] * 2
        assert rows[0].format == "by block"
        assert rows[0].sparse_ms == 0.5
        with torch.no_grad():  # 20 tokens are fewer than 512: as dense
            same = torch.allclose(CompiledModel(program)(**prompt).logits, model(**prompt).logits, atol=1e-5)
        assert same == (below == 512)


@pytest.mark.parametrize(("wins", "limit"), [((), None), ((512, 2048), 512), ((128, 512, 2048), 128), ((128,), None)])
@pytest.mark.parametrize("kind", ["eager", "graph"])
def test_lowering_measures_from_which_length_on_dense_attention_is_by_the_kernel(monkeypatch: pytest.MonkeyPatch, kind: str, wins: tuple[int, ...],
                                                                                 limit: int | None) -> None:
    slow, fast = Timing(1.0, 1.0, 1.0), Timing(0.5, 0.5, 0.5)
    times = {tokens: {"dense": slow, "every": fast if tokens in wins else slow} for tokens in (128, 512, 2048)}
    monkeypatch.setattr(_dense_attention, "_times", lambda *given: times)
    torch.manual_seed(0)
    x, mask = torch.randn(2, 150, 16, dtype=torch.float32), torch.ones(2, 150, dtype=torch.long)
    mask[1, :9] = 0
    ids = torch.randint(1, 96, (2, 150))
    model: nn.Module = llama(max_position_embeddings=256) if kind == "eager" else Masked().eval()
    given: Any = {"input_ids": ids, "attention_mask": mask} if kind == "eager" else (x, mask)
    program = Pipeline.parse("lower(rounds=1)").run(capture(model, given), Context(target=host(), kernels=runtime))
    rows = [row for row in program.decisions.values() if row.kind == "attention"]
    assert len(rows) == (0 if limit is None else 2 if kind == "eager" else 1)
    assert all(row.format == "dense" and f"from {limit} tokens on: 2.00 times" in row.reason for row in rows)
    compiled = CompiledModel(program)
    used: list[int] = []
    monkeypatch.setattr(attend, "every_key", lambda *sizes: used.append(sizes[1]) or every_key(*sizes))
    with torch.no_grad():
        found, expected = (one(**given).logits if kind == "eager" else one(*given) for one in (compiled, model))
    assert bool(used) == (limit == 128)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, 9:], expected[1, 9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eager", "graph"])
def test_what_an_indexer_finds_is_measured_on_the_models_own_keys(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    measured: list[tuple[Tensor, ...]] = []

    def times(kind: Any, tensors: tuple[Tensor, ...], learned: tuple[Tensor, ...], rounds: int) -> dict[str, Timing]:
        measured.append(tensors)
        return {"dense": Timing(2.0, 2.0, 2.0), "blocks": Timing(1.0, 1.0, 1.0)}

    monkeypatch.setattr(_attention, "_times", times)
    torch.manual_seed(0)
    x, mask = torch.randn(2, 21, 16), torch.ones(2, 21, dtype=torch.long)
    model, batch = (llama(), {"input_ids": torch.randint(1, 96, (1, 21))}) if kind == "eager" else (Encoder().eval(), (x, mask))
    dynamic = "select_blocks(always=(), scorer=pooled, selector='top_k(share=0.5)', block_q=4, block_k=4)"
    ctx = Context(target=host(), kernels=runtime, batches=[batch])
    program = Pipeline.parse(f"{dynamic} | pack() | lower(rounds=1)").run(capture(model, batch), ctx)
    for query, key, value in measured:
        tokens = key.shape[2]
        assert torch.equal(key[:, :, :tokens - 21], key[:, :, 21:])
        assert torch.equal(value[:, :, :tokens - 21], value[:, :, 21:])
        assert query.shape[2] in (1, tokens)
    if kind == "graph":
        expected = model.get_submodule("v")(x)[:1].unflatten(-1, (2, 8)).transpose(1, 2)
        torch.testing.assert_close(measured[0][2][:, :, -21:], expected)
    assert next(iter(program.decisions.values())).density == pytest.approx(0.5, abs=0.02)


def test_a_graph_becomes_what_it_was_where_blocks_never_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_times", lambda *given: {"dense": Timing(1.0, 1.0, 1.0), "blocks": Timing(2.0, 2.0, 2.0)})
    torch.manual_seed(0)
    model, x, mask = Encoder().eval(), torch.randn(1, 21, 16), torch.ones(1, 21, dtype=torch.long)
    ctx = Context(target=host(), kernels=runtime)
    program = Pipeline.parse(f"{SPARSE} | pack() | lower(rounds=1)").run(capture(model, (x, mask)), ctx)
    assert not [node for _, node in program.nodes() if node.target is attend.op]
    torch.testing.assert_close(CompiledModel(program)(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_a_triangle_is_causal() -> None:
    """Models captured whole hand over their causal mask as a tensor, with padding in it."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 9, 4, dtype=torch.float32)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :3] = False
    text = "Indexer(always=(Windows(size=2),), scorer=pooled, selector='top_k(share=0.5)', block_q=2, block_k=2)"
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & padding[:, None, None]
    expected = attend.op(query, key, value, padding[:, None, None], is_causal=True, indexer=text)
    assert torch.equal(attend.op(query, key, value, mask, indexer=text), expected)
    assert attend.split_mask(mask, query, key)[1:] == (None, True)
    assert attend.split_mask(mask[:1].expand(2, 2, 9, 9), query, key)[1:] == (None, True)
    short = attend.split_mask(mask[:, :, 4:], query[:, :, 4:], key)  # a chunk of the prompt
    assert short[1:] == (None, True)
    mask[0, 0, 5, 2] = False  # written to, and no triangle any more
    key_mask, bias, causal = attend.split_mask(mask, query, key)
    assert key_mask is None
    assert not causal
    assert bias is not None


class Biased(Encoder):
    """Attention with relative positions, as MPNet has it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        apart = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs().to(x.dtype)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=-apart[None, None]).transpose(1, 2).flatten(2)


def test_what_is_added_to_the_scores_stays_and_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, mask = Biased().eval(), torch.randn(1, 21, 16), torch.ones(1, 21, dtype=torch.long)
    dense = rewritten(model, DENSE, (x, mask))
    torch.testing.assert_close(dense(x, mask), model(x, mask), rtol=1e-5, atol=1e-5)
    seen = []
    monkeypatch.setattr(_attention, "PROMPTS", (32,))
    monkeypatch.setattr(_attention, "CACHES", (32,))
    monkeypatch.setattr(attend, "by_indexer", lambda indexer, q, k, v, given, learned, **rest: seen.append(given) or q)
    Pipeline.parse(f"{SPARSE} | pack() | lower(rounds=1)").run(capture(model, (x, mask)), Context(target=host(), kernels=runtime))
    assert {tuple(given.shape) for given in seen} == {(1, 1, 32, 32), (1, 1, 1, 32)}


def test_relative_positions_of_a_library_are_added() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, mask = torch.randint(1, 50, (2, 21)), torch.ones(2, 21, dtype=torch.long)
    mask[1, 17:] = 0
    everything = "Indexer(always=(Windows(size=99),), block_q=4, block_k=4)"
    sparse = copy.deepcopy(model)
    found = find_library_attentions(sparse)
    assert len(found) == 6
    assert not any(found.values())
    give_indexers(sparse, dict.fromkeys(found, everything), {})
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :9]}
    with torch.no_grad():
        torch.testing.assert_close(sparse(**given).logits, model(**given).logits)
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(*(one.generate(ids, attention_mask=mask, **options) for one in (sparse, model)))


@pytest.mark.parametrize("padded", [False, True])
def test_a_language_model_is_one_graph_for_torch_compile(padded: bool) -> None:
    model, ids = llama(num_hidden_layers=1), torch.randint(1, 96, (2, 20))
    ours = copy.deepcopy(model)
    give_indexers(ours, dict.fromkeys(find_library_attentions(ours), "Indexer(always=(Everything(),), dense_below=99, dense_kernel_from=8)"), {})
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :4] = 0
    with torch.no_grad():
        found = torch.compile(ours, backend="eager", fullgraph=True)(**given).logits
        torch.testing.assert_close(found[:, 4:], model(**given).logits[:, 4:])


class Masked(Encoder):
    """Causal by a mask that is a tensor, as language models captured whole have it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        place = torch.arange(x.shape[1])
        keep = (place <= place[:, None]) & mask.bool()[:, None, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", [Masked, Encoder])
def test_a_causal_mask_that_is_a_tensor_is_measured_as_such(monkeypatch: pytest.MonkeyPatch, kind: type[Encoder]) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(_attention, "_times", lambda of, *rest: seen.append(of) or {name: Timing(1.0, 1.0, 1.0) for name in ("dense", "blocks")})
    torch.manual_seed(0)
    x, mask = torch.randn(1, 21, 16), torch.ones(1, 21, dtype=torch.long)
    Pipeline.parse(f"{SPARSE} | pack() | lower(rounds=1)").run(capture(kind().eval(), (x, mask)), Context(target=host(), kernels=runtime))
    assert {of.causal for of in seen} == {kind is Masked}


@pytest.mark.parametrize("mask", [(1, 1, 1, 21), (2, 1, 1, 21), (2, 6, 1, 21), (6, 1, 21), (1, 21), None])
def test_one_row_of_grouped_heads_is_attended_densely_as_rows_of_one_head(mask: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape, dtype=torch.float32) for shape in ((2, 6, 1, 8), (2, 3, 21, 8), (2, 3, 21, 5)))
    expected = None if mask is None else torch.rand(mask, dtype=torch.float32) < 0.7
    for given in (expected, None if expected is None else expected.float()):
        out = attend.dense(query, key, value, given, is_causal=True, scale=0.4)
        again = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=0.4, enable_gqa=True)
        torch.testing.assert_close(out, again)
    assert attend.dense(query[:0], key[:0], value[:0]).shape == (0, 6, 1, 5)


@pytest.mark.parametrize("shape", [(2, 6, 1, 21), (1, 6, 9, 21), (6, 9, 21)])
def test_a_mask_that_heads_do_not_share_is_each_heads_own(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(size, dtype=torch.float32) for size in ((2, 6, 9, 8), (2, 3, 21, 8), (2, 3, 21, 5)))
    mask = torch.rand(shape, dtype=torch.float32) < 0.7
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    for text in ("Indexer(always=(Everything(),), block_q=4, block_k=4)", "Indexer(always=(Everything(),), dense_below=99, dense_kernel_from=1)"):
        torch.testing.assert_close(attend.by_indexer(Indexer.parse(text), query, key, value, mask), expected)


def test_the_kernel_computes_dense_attention_of_as_many_rows_and_keys_as_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(attend, "_by_kernel", lambda query, key, *rest: asked.append((query.shape[2], key.shape[2])))
    sizes = [(8, 8), (8, 7), (7, 8), (1, 40), (12, 40)]
    for queries, keys in sizes:
        attend.dense(*(torch.ones(1, 1, tokens, 4, dtype=torch.float32) for tokens in (queries, keys, keys)), kernel_from=8)
    assert asked == [(8, 8), (12, 40)]


def test_what_is_added_to_the_scores_has_a_gradient() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 4).double().requires_grad_()
    bias = torch.randn(1, 1, 9, 9, dtype=torch.float64, requires_grad=True)
    indexer = "Indexer(always=(SlidingWindow(window=4), Sinks(tokens=1)), block_q=2, block_k=3)"

    def function(*given: Tensor) -> Tensor:
        out: Tensor = attend.op(*given, is_causal=True, indexer=indexer)
        return out

    assert torch.autograd.gradcheck(function, (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_(), bias))


def test_prompts_and_decoding_have_limits_of_their_own() -> None:
    indexer = Indexer.parse("Indexer(always=(Sinks(tokens=1),), dense_below=100, dense_below_decoding=1000)")
    assert [indexer.is_dense(queries, 500) for queries in (500, 9, 8, 1)] == [False, False, True, True]
    assert [indexer.is_dense(queries, keys) for queries, keys in ((99, 99), (100, 100), (1, 1000))] == [True, False, False]


def test_a_step_of_decoding_reads_the_sums_that_its_cache_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(llama(), {"input_ids": torch.randint(1, 96, (1, 12))}, {"input_ids": {0: "batch", 1: "tokens"}})
    model = CompiledModel(Pipeline.parse(
        "select_blocks(always=(SlidingWindow(window=4),), scorer=pooled, selector='top_k(share=0.5)', block_q=4, block_k=4)").run(program, Context()))
    ids, seen, reduced = torch.randint(1, 96, (1, 40)), [], key_sums._reduced
    monkeypatch.setattr(key_sums, "_reduced", lambda key, *rest: seen.append(key.shape[2]) or reduced(key, *rest))
    with torch.no_grad():
        cache = transformers.DynamicCache()
        model(input_ids=ids, past_key_values=cache)
        seen.clear()
        for i in range(6):
            model(input_ids=ids[:, i:i + 1], past_key_values=cache)
    assert seen
    assert max(seen) <= 4


def test_attention_that_only_its_mask_makes_causal_is_left_alone() -> None:
    """The library computes this model's attention eagerly, and its decoder says is_causal=False: a kernel that went by that would read the future."""
    config = transformers.NllbMoeConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_experts=2, pad_token_id=0)
    eager = transformers.NllbMoeForConditionalGeneration(config).eval()
    found = find_library_attentions(eager)
    assert len(found) == 3
    assert all("only its mask says" in str(why) for why in found.values())
    assert find_library_attentions(eager.model.decoder.layers[0].self_attn) == {"": None}, "of a module alone nothing is known"
    bart = transformers.BartModel(transformers.BartConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                                          decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64))
    assert set(find_library_attentions(bart).values()) == {None}
