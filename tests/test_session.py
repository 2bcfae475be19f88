"""What parts of a model tell each other beside their arguments: neurons that are held while a text goes on, FFNs that a row skips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.language import llama
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import session
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.ops import held_ffn, noted, put_rows, take_rows
from sparsify_compiler.passes.activation.skip_ffns import _limit as skip_limit
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

transformers = pytest.importorskip("transformers")

HOLD, SKIP = "hold_neurons(density=0.5)", "skip_ffns(density=0.75, first=0.2, last=0.1, warm=3)"
DYNAMIC = {"input_ids": {0: "batch", 1: "tokens"}}
IDS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))


def model_of_five() -> nn.Module:
    """Five layers, with FFNs that turn the stream a little more than random ones do."""
    model = llama(num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=1)
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.down_proj.weight *= 10
    return model


def rewritten(program: Program, step: str) -> nn.Module:
    ctx = Context(batches=[{"input_ids": IDS}])
    made = Pipeline.parse(step).run(program, ctx, ())
    assert not ctx.misses
    return instantiate(made)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return model_of_five()


@pytest.fixture(scope="module")
def captured(dense: nn.Module) -> Program:
    return capture(dense, {"input_ids": IDS}, DYNAMIC)


@pytest.fixture(scope="module")
def held(captured: Program) -> nn.Module:
    return rewritten(captured, HOLD)


@pytest.fixture(scope="module")
def skipping(captured: Program) -> nn.Module:
    return rewritten(captured, SKIP)


@pytest.fixture(autouse=True)
def no_call_is_left() -> Iterator[None]:
    with torch.no_grad():
        yield
    assert session.current() is None


class ByHand:
    """The same held neurons, written over the dense model's own modules: 0 for every neuron that the prompt of a row did not hold."""

    def __init__(self, model: nn.Module, real: Tensor) -> None:
        self.model, self.real, self.kept, self.prompt = model, real, dict[int, Tensor](), True

    def __enter__(self) -> ByHand:
        self.handles = [layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, i=i: self._held(i, args[0]))
                        for i, layer in enumerate(self.model.model.layers)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _held(self, layer: int, hidden: Tensor) -> tuple[Tensor, ...]:
        if not self.prompt:
            return (hidden * self.kept[layer][:, None],)
        self.kept[layer] = torch.zeros(hidden.shape[0], hidden.shape[2])
        for row in range(hidden.shape[0]):
            votes = torch.zeros(hidden.shape[2])
            for token in hidden[row][self.real[row]]:
                positive = int((token > 0).sum())
                votes[token.topk(-(-positive * 4 // 10)).indices] += 1
            self.kept[layer][row, votes.topk(hidden.shape[2] // 2).indices] = 1
        return (hidden,)


def step_by_step(model: Any, ids: Tensor, mask: Tensor, prompt: int, by_hand: ByHand | None = None) -> Tensor:
    """Logits of all tokens: the prompt in one call, then a token a call."""
    cache, found = transformers.DynamicCache(), []
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        made = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], position_ids=places[:, start:end], cache=cache, use_cache=True)
        found.append(made.logits)
        if by_hand is not None:
            by_hand.prompt = False
    return torch.cat(found, 1)


def padded() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 96, (2, 14), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids * mask, mask


def test_held_neurons_are_those_that_the_prompt_voted_for(dense: nn.Module, held: nn.Module) -> None:
    ids, mask = padded()
    with ByHand(dense, mask[:, :9].bool()) as by_hand:
        expected = step_by_step(dense, ids, mask, 9, by_hand)
    found = step_by_step(held, ids, mask, 9)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    plain = step_by_step(dense, ids, mask, 9)
    assert not torch.allclose(found[:, 9:], plain[:, 9:], atol=1e-2)
    torch.testing.assert_close(found[:, :9][mask[:, :9].bool()], plain[:, :9][mask[:, :9].bool()])


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=["greedy", "beams", "static cache"])
@pytest.mark.parametrize("kind", ["held", "skipping"])
def test_a_text_in_a_padded_batch_is_written_as_alone(kind: str, way: dict[str, Any], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    ids, mask = padded()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=-1, **way)
    for row in range(2):
        own = ids[row : row + 1, mask[row].argmax() :]
        alone = model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=6, do_sample=False, eos_token_id=-1, **way)
        assert torch.equal(alone[0, -6:], together[row, -6:])


def test_texts_do_not_mix(held: nn.Module) -> None:
    """Two texts that take turns, and one on a cache that was used before."""
    texts = [torch.randint(1, 96, (1, 10), generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    alone = [step_by_step(held, ids, torch.ones_like(ids), 7)[:, 7:] for ids in texts]
    caches = [transformers.DynamicCache() for _ in texts]
    for ids, cache in zip(texts, caches, strict=True):
        held(input_ids=ids[:, :7], cache=cache)
    turns = [[held(input_ids=ids[:, t : t + 1], cache=cache).logits for ids, cache in zip(texts, caches, strict=True)] for t in range(7, 10)]
    for number, expected in enumerate(alone):
        torch.testing.assert_close(torch.cat([turn[number] for turn in turns], 1), expected)
    caches[0].crop(-10)  # all of it: the next call begins a text
    assert caches[0].get_seq_length() == 0
    held(input_ids=texts[1][:, :7], cache=caches[0])
    torch.testing.assert_close(held(input_ids=texts[1][:, 7:8], cache=caches[0]).logits, alone[1][:, :1])


def test_what_nobody_knows_is_computed_whole(dense: nn.Module, held: nn.Module, skipping: nn.Module) -> None:
    ids = torch.randint(1, 96, (1, 8), generator=torch.Generator().manual_seed(7))
    expected = dense(input_ids=ids).logits[:, 7:]
    cache = dense(input_ids=ids[:, :7], use_cache=True).cache
    torch.testing.assert_close(held(input_ids=ids[:, 7:], cache=cache).logits, expected)  # a cache that another model filled
    ffn = held.get_submodule("model.layers.1.mlp")
    x = torch.randn(1, 1, 32)
    torch.testing.assert_close(ffn(x), dense.get_submodule("model.layers.1.mlp")(x))  # and a part that is called alone
    x = torch.full((1, 9, 32), 3.0)
    torch.testing.assert_close(skipping.get_submodule("model.layers.3.mlp")(x), dense.get_submodule("model.layers.3.mlp")(x))


def test_a_long_call_votes_too() -> None:
    """A prompt in two pieces holds what a prompt in one does; a short piece changes nothing."""
    torch.manual_seed(0)
    up, down, gate = torch.randn(24, 8), torch.randn(8, 24), torch.randn(24, 8)
    options: dict[str, Any] = {"activation": "silu", "density": 0.25, "share": 0.4, "prompt": 4, "key": "ffn"}
    x = torch.randn(1, 11, 8)

    def after(*pieces: tuple[int, int]) -> Tensor:
        text: dict[str, Any] = {}
        for start, end in pieces:
            with session.running(session.Call(text, start, (1, end - start), None)):
                y = held_ffn.op(x[:, start:end], up, down, gate, **options)
        return y

    whole = after((0, 9), (10, 11))
    torch.testing.assert_close(after((0, 4), (4, 9), (10, 11)), whole)
    torch.testing.assert_close(after((0, 9), (9, 10), (10, 11)), whole)
    assert not torch.allclose(after((0, 4), (10, 11)), whole)
    held = (torch.nn.functional.silu(x[:, 10:] @ gate.t()) * (x[:, 10:] @ up.t()))
    hidden = torch.nn.functional.silu(x[:, :9] @ gate.t()) * (x[:, :9] @ up.t())
    votes = torch.stack([torch.zeros(24).index_fill(0, h.topk(-(-int((h > 0).sum()) * 4 // 10)).indices, 1.0) for h in hidden[0]]).sum(0)
    kept = torch.zeros(24).index_fill(0, votes.topk(6).indices, 1.0)
    torch.testing.assert_close(whole, (held * kept) @ down.t())


class Skipped:
    """The guard by hand, around the dense model's own FFNs: 0 for a row behind one of limits' blocks that turned it less than the limit."""

    def __init__(self, model: nn.Module, limit: float, chain: range, warm: int) -> None:
        self.model, self.limit, self.chain, self.warm, self.places, self.skipped = model, limit, chain, warm, torch.zeros(0), 0

    def __enter__(self) -> Skipped:
        layers = self.model.model.layers
        self.handles = [layers[i].post_attention_layernorm.register_forward_pre_hook(lambda module, args: self._stream(args[0])) for i in self.chain]
        self.handles += [layers[i].mlp.register_forward_hook(lambda module, args, y, i=i: self._around(i, y)) for i in self.chain]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _stream(self, x: Tensor) -> None:
        self.stream = x

    def _around(self, layer: int, y: Tensor) -> Tensor:
        if layer == self.chain[0]:
            self.open = torch.ones(y.shape[:2], dtype=torch.bool)
        runs = self.open | (self.places < self.warm)
        self.skipped += int((~runs).sum())
        y = y * runs[..., None]
        self.open = self.open & (nn.functional.cosine_similarity(self.stream, self.stream + y, dim=-1) < self.limit)
        return y


def test_rows_skip_what_stands_behind_a_block_that_hardly_turned_them(dense: nn.Module, skipping: nn.Module) -> None:
    """In a padded batch, the prompt in one call and then token by token; the first three of each text skip nothing."""
    limits = [float(value) for name, value in skipping.state_dict().items() if "guard_limit" in name]
    assert len(limits) == 2
    assert limits[0] == limits[1]
    ids, mask = padded()
    with Skipped(dense, limits[0], range(1, 4), 3) as by_hand:
        by_hand.places = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
        expected = dense(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    assert 5 < by_hand.skipped < 2 * 14 * 2
    torch.testing.assert_close(step_by_step(skipping, ids, mask, 6)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_rows_skip_in_one_graph() -> None:
    from sparsify_compiler.passes.activation.skip_ffns import example

    model, (x,) = example()
    made = instantiate(Pipeline.parse("skip_ffns(density=0.7, first=0.2, warm=2)").run(capture(model, (x,)), Context(batches=[(x,)]), ()))
    limit = next(value for name, value in made.state_dict().items() if "guard_limit" in name)
    expected, open_ = x, torch.ones(2, 20, dtype=torch.bool)
    for number, (norm, layer) in enumerate(zip(model.norms, model.layers, strict=True)):  # type: ignore[arg-type]
        change = layer["mlp"](norm(expected))
        if 1 <= number < 4:
            change = change * (open_ | (torch.arange(20) < 2))[..., None]
            open_ = open_ & (nn.functional.cosine_similarity(expected, expected + change, dim=-1) < limit)
        expected = expected + change
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
    assert 0 < int(open_.sum()) < 40
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


@pytest.mark.parametrize("step", [HOLD.replace("0.5", "1.0"), SKIP.replace("0.75", "1.0")], ids=["held", "skipping"])
def test_nothing_left_out_writes_as_the_dense_model(step: str, dense: nn.Module, captured: Program) -> None:
    ids, mask = padded()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(rewritten(captured, step).generate(ids, **options), dense.generate(ids, **options))


def test_compiled_saved_and_loaded(dense: nn.Module, captured: Program, tmp_path: Path) -> None:
    ids, mask = padded()
    both = f"{SKIP} | hold_neurons(density=0.5, targets=('model.layers.0.mlp',))"
    compiled = sc.compile(dense, {"input_ids": IDS}, recipe=Pipeline.parse(f"{both} | pack() | lower(margin=-1000.0, rounds=1)"), dynamic=DYNAMIC,
                          calibration=[{"input_ids": IDS}])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    expected = rewritten(captured, both).generate(ids, **options)
    assert torch.equal(compiled.generate(ids, **options), expected)
    assert sum("while a text goes on" in row.reason for row in compiled.report().sites) == 1
    compiled.save(tmp_path / "saved")
    assert torch.equal(sc.load(tmp_path / "saved", model=model_of_five()).generate(ids, **options), expected)


@pytest.mark.parametrize("net", [0, 1], ids=["gated", "plain"])
def test_what_does_not_pay_is_dense_and_fewer_rows_fit_the_kernels_of_many(net: int) -> None:
    from sparsify_compiler.passes.activation import hold_neurons, skip_ffns

    model, (x,) = hold_neurons.example()
    model = model if net == 0 else nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    compiled = sc.compile(model, (x,), recipe=Pipeline.parse("hold_neurons(density=0.5) | pack() | lower(margin=0.99, rounds=1)"))
    torch.testing.assert_close(compiled(x), model(x))
    assert "computes everything" in compiled.report().sites[-1].reason
    assert compiled.report().sites[-1].density == 1.0
    model, (x,) = skip_ffns.example()
    ctx = Context(batches=[(x,)])
    expected = instantiate(Pipeline.parse("skip_ffns(density=0.7, warm=2)").run(capture(model, (x,)), ctx, ()))(x)
    recipe = Pipeline.parse("skip_ffns(density=0.7, warm=2) | pack() | lower(margin=-1000.0, rounds=1)")
    torch.testing.assert_close(sc.compile(model, (x,), recipe=recipe, calibration=[(x,)])(x), expected)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, float("nan")]), min_size=0, max_size=6), st.sampled_from([(), (1,), (2, 1)]),
       st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_come_back_to_their_places(opened: list[float], lead: tuple[int, ...], dtype: torch.dtype) -> None:
    size = torch.Size((*lead, len(opened)))
    open_ = torch.tensor(opened).expand(size)[..., None].to(dtype)
    x = torch.randn(*size, 3).to(dtype)
    taken = take_rows.op(x, open_)
    assert taken.shape == (*(1,) * len(lead), int((open_ != 0).sum()), 3)
    assert torch.equal(put_rows.op(taken * 2, open_), torch.where(open_ != 0, x * 2, torch.zeros_like(x)))


def test_values_train_through_rows() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    open_ = torch.tensor([1.0, 0, 0, 1])[:, None]
    with torch.enable_grad():
        put_rows.op(take_rows.op(x, open_) * 2, open_).sum().backward()
    assert torch.equal(x.grad, 2 * open_.expand(4, 3))


def test_notes_hold_for_their_call_only(skipping: nn.Module) -> None:
    x = torch.randn(2, 3)
    assert torch.equal(noted.op(x, "a", True), x)
    assert session.current() is None
    with session.running(session.Call({}, 0, (1, 2), None)):
        noted.op(x, "a", True)
        assert torch.equal(noted.op(torch.zeros(3, 2), "a"), x.reshape(3, 2))
        assert torch.equal(noted.op(torch.zeros(5), "a"), torch.zeros(5))
        assert torch.equal(noted.op(torch.zeros(1, 2, 1), session.PLACES)[0, :, 0], torch.tensor([0.0, 1]))
    with pytest.raises(ValueError, match="exactly one"):
        skipping(input_ids=None)  # a call that fails takes its notes with it


@pytest.mark.parametrize("pairs", [False, True])
def test_padding_has_no_place(pairs: bool) -> None:
    """Of a mask of tokens, and of one of pairs in which padding does not see itself."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    before = 1
    given = torch.ones(6, 6, dtype=torch.bool).tril() & mask.bool()[:, None] if pairs else mask
    places = session.Call(None, before, (2, 5), given[:, None, before:] if pairs else given).read(session.PLACES)
    assert places is not None
    assert places.tolist() == [[-1.0, 0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]]


def test_bad_options() -> None:
    for text in ("hold_neurons(share=2.0)", "hold_neurons(prompt=1)", "skip_ffns(first=-1.0)", "skip_ffns(warm=-1)"):
        with pytest.raises(ParseError):
            Pipeline.parse(text)
    from sparsify_compiler.passes.activation.skip_ffns import example

    model, inputs = example()
    with pytest.raises(CalibrationError, match="there are none"):
        Pipeline.parse("skip_ffns(density=0.5)").run(capture(model, inputs), Context(), ())
    ctx = Context(batches=[inputs])
    Pipeline.parse("skip_ffns(density=0.5, first=0.9)").run(capture(model, inputs), ctx, ())
    assert "may be skipped" in str(ctx.misses[0])


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20, unique=True), st.integers(0, 21))
def test_no_row_is_at_the_limit_of_skipped_ffns(cosines: list[float], wanted: int) -> None:
    """Rounding would decide of it; as many as are wanted lie below."""
    highest = torch.tensor(cosines, dtype=torch.float32).add(0.0)[:, None]
    limit = skip_limit(highest, wanted / len(cosines))
    assert int((highest < limit).sum()) == min(wanted, len(cosines))
    apart = torch.tensor([[-0.5], [0.25], [0.75]])
    assert [skip_limit(apart, count / 3) for count in range(4)] == [-0.75, -0.125, 0.5, 2.0]
