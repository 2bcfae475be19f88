"""Tokens and texts that are routed around residual blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import open_texts, put_part, take_part, top_tokens
from sparsify_compiler.passes.moe.route_tokens import Block, _first
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program

DYNAMIC = {"input": {0: "batch", 1: "tokens"}}


def routed(model: nn.Module, inputs: Any, text: str, dynamic: Any = None) -> tuple[Program, Any, list[str]]:
    program = capture(model, inputs, dynamic=dynamic) if dynamic else capture(model, inputs)
    ctx = Context(batches=[inputs])
    after = sc.Pipeline.parse(text).run(program, ctx)
    return after, instantiate(after), [str(miss) for miss in ctx.misses]


def blocks(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(16, 4) for _ in range(count)]).eval()


def scores_of(program: Program, block: int, x: Tensor) -> Tensor:
    """What the router of a block gives for x, from its stored weights."""
    state = instantiate(program).state_dict()
    weight, offset = (next(value for key, value in state.items() if f"{block}.router.{name}" in key) for name in ("weight", "offset"))
    return x @ weight.T + offset


# --- ops -------------------------------------------------------------------------------------------------------------------------------


def test_the_highest_tokens_in_their_order_rounded_up() -> None:
    scores = torch.tensor([[3.0, 1, 2, 5, 4], [1, 2, 3, 4, 5]])
    assert top_tokens.op(scores, 0.5).tolist() == [[0, 3, 4], [2, 3, 4]]
    assert top_tokens.op(scores, 0.01).tolist() == [[3], [4]]
    assert top_tokens.op(scores, 1e-9).tolist() == [[3], [4]]
    assert top_tokens.op(scores, 1.0).tolist() == [list(range(5))] * 2


def test_a_part_comes_back_to_its_place() -> None:
    x = torch.randn(3, 5, 2, requires_grad=True)
    index = torch.tensor([[0, 4], [1, 2], [2, 3]])
    part = take_part.op(x, index, 1)
    assert torch.equal(part[1], x[1, 1:3])
    back = put_part.op(x.detach(), part * 0 + 7, index)
    assert (back == 7).sum(2).ne(0).nonzero().tolist() == [[0, 0], [0, 4], [1, 1], [1, 2], [2, 2], [2, 3]]
    part.sum().backward()
    assert x.grad is not None
    assert float(x.grad.sum()) == 12
    open_ = open_texts.op(torch.tensor([0.0, 2, 0]))
    assert torch.equal(put_part.op(x.detach(), take_part.op(x.detach(), open_, 0) + 1, open_)[1], x.detach()[1] + 1)
    mask = torch.arange(25.0).view(1, 1, 5, 5)
    both = take_part.op(take_part.op(mask, index, 2), index, 3)
    assert both[2, 0].tolist() == [[12, 13], [17, 18]]
    with pytest.raises(RuntimeError, match="no dimension"):
        take_part.op(x, index, 0)


# --- tokens ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, DYNAMIC])
def test_the_chosen_tokens_run_through_the_block_and_the_others_pass_it_by(dynamic: Any) -> None:
    model, x = blocks(1), torch.randn(3, 10, 16)
    program, module, _ = routed(model, (x,), "route_tokens(density=0.4, routed=1.0)", dynamic)
    for given in [x] + [torch.randn(2, 7, 16)] * bool(dynamic):
        index = top_tokens.op(scores_of(program, 0, given)[..., 0], 0.4)
        part = torch.stack([text[own] for text, own in zip(given, index, strict=True)])
        expected = given.clone()
        for at, (own, rows) in enumerate(zip(index, model(part), strict=True)):
            expected[at, own] = rows
        torch.testing.assert_close(module(given), expected)


class Told(nn.Module):
    """A block that is told a mask [B, 1, T, T] and a factor for every place [1, T, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.out = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        query = (self.q(self.norm(x)) * places).unflatten(-1, (2, 8)).transpose(1, 2)
        x = x + self.out(scaled_dot_product_attention(query, query, query, attn_mask=mask).transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(self.up(x).relu())
        return found


def test_masks_and_places_are_those_of_the_chosen_tokens() -> None:
    torch.manual_seed(0)
    model = Told().eval()
    x, mask, places = torch.randn(2, 9, 16), torch.randn(2, 1, 9, 9), torch.randn(1, 9, 1)
    program = capture(model, (x, mask, places), dynamic={"x": {0: "b", 1: "t"}, "mask": {0: "b", 2: "t", 3: "t"}, "places": {1: "t"}})
    recipe = sc.Pipeline.parse("route_tokens(density=0.5, routed=1.0, router='random', weight='one')")
    after = recipe.run(program, Context(batches=[(x, mask, places)]))
    state = instantiate(after).state_dict()
    index = top_tokens.op((x @ next(value for key, value in state.items() if "router.weight" in key).T)[..., 0], 0.5)
    expected = x.clone()
    for at, own in enumerate(index):
        expected[at, own] = model(x[at : at + 1, own], mask[at : at + 1, :, own][..., own], places[:, own])[0]
    torch.testing.assert_close(instantiate(after)(x, mask, places), expected)


@pytest.mark.parametrize("text", ["route_tokens(density=1.0, routed=1.0)", "route_blocks(density=1.0, group=2)"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_with_every_token_or_block_it_is_the_model(kind: str, text: str) -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = BertModel(BertConfig(**sizes)) if kind == "bert" else LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    ids = torch.randint(1, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask} | ({"use_cache": False} if kind == "llama" else {})
    dynamic = {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")}
    after, module, misses = routed(model.eval(), inputs, text, dynamic)
    assert not misses
    assert len(after.decisions) == 2
    assert "take_part" in after.text()
    longer = {**inputs, "input_ids": torch.randint(1, 64, (2, 14)), "attention_mask": torch.ones(2, 14, dtype=torch.int64)}
    for given in (inputs, longer):
        torch.testing.assert_close(module(**given)[0], model(**given)[0], atol=1e-5, rtol=1e-4)


def test_a_causal_model_stays_causal_among_the_chosen() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)).eval()
    ids = torch.randint(1, 64, (1, 12))
    program, module, _ = routed(model, {"input_ids": ids, "use_cache": False}, "route_tokens(density=0.5, routed=1.0)",
                                {"input_ids": {0: "batch", 1: "tokens"}})
    layer = model.model.layers[0]
    hidden = model.model.embed_tokens(ids)
    weight = next(value for key, value in module.state_dict().items() if "layers.0.router.weight" in key)
    offset = next(value for key, value in module.state_dict().items() if "layers.0.router.offset" in key)
    index = top_tokens.op((hidden @ weight.T + offset)[..., 0], 0.5)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(12)[None])
    part = layer(hidden[:, index[0]], position_embeddings=(cos[:, index[0]], sin[:, index[0]]))
    part = part if isinstance(part, Tensor) else part[0]
    after_first = hidden.clone()
    after_first[:, index[0]] = part
    second = capture_of_stream(program, {"input_ids": ids, "use_cache": False})
    torch.testing.assert_close(second, after_first, atol=1e-5, rtol=1e-4)


def capture_of_stream(program: Program, inputs: Any) -> Tensor:
    """The stream behind the first block that tokens pass by."""
    from sparsify_compiler.calibrate_rows import collect_rows

    region = program.regions[""]
    node = next(node for node in region.graph.nodes if node.target is put_part.op)
    rows, _ = collect_rows(program, [inputs], [("", node.name)])
    return rows["", node.name][None]


def test_blocks_of_the_lowest_attention_rank_are_routed() -> None:
    model, x = blocks(3), torch.randn(2, 12, 16)
    with torch.no_grad():
        model[1].qkv.weight[:16].zero_()  # type: ignore[index, union-attr]
        model[1].qkv.bias[:16].zero_()  # type: ignore[index, union-attr]
    after, _, _ = routed(model, (x,), "route_tokens(density=0.8, routed=0.34, importance='attention_rank')")
    assert [path[0] for path in after.decisions] == ["1"]
    assert after.decisions["1@1"].density == pytest.approx(0.4)


def test_the_density_is_of_all_blocks_and_refused_where_too_few_are_routed() -> None:
    after, _, _ = routed(blocks(), (torch.randn(2, 12, 16),), "route_tokens(density=0.7, routed=0.5)")
    assert [row.density for row in after.decisions.values()] == [pytest.approx(0.4)] * 2
    after, _, misses = routed(blocks(), (torch.randn(2, 12, 16),), "route_tokens(density=0.4, routed=0.5)")
    assert not after.decisions
    assert "cannot bring their tokens" in misses[0]
    for text, why in (("route_tokens(density=0.8, routed=0.2)", "cannot bring their tokens"),
                      ("route_blocks(density=0.8, group=2, first=8)", "in groups cannot bring")):
        after, _, misses = routed(blocks(10), (torch.randn(2, 12, 16),), text)  # the share is 2e-16, in floating point
        assert not after.decisions
        assert why in misses[0]
    for text in ("route_tokens(density=0.9, routed=0.1)", "gamma_mod(density=0.9, first=4)"):
        after, _, misses = routed(blocks(), (torch.randn(2, 12, 16),), text)
        assert not after.decisions
        assert "is none" in misses[0]


def test_what_cannot_run_on_a_part_says_why() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inside = self.first(x).relu()
            return x + self.second(inside), inside

    for model, x, said in [(Read(), torch.randn(2, 9, 16), "read elsewhere"), (blocks(1), torch.randn(2, 4, 16), "another size is 4"),
                           (Read(), torch.randn(9, 16), "not [texts, tokens, width]")]:
        after, _, misses = routed(model.eval(), (x,), "route_tokens(density=0.5, routed=1.0)")
        assert any(said in miss for miss in misses), misses
        assert "take_part" not in after.text()
    for second, why in (("route_tokens(density=0.5)", "routed already"), ("route_blocks(density=0.5)", "runs on a part already")):
        ctx = Context(batches=[(torch.randn(2, 9, 16),)])
        sc.Pipeline.parse(f"route_tokens(density=0.8, routed=0.5) | {second}").run(capture(blocks(), (torch.randn(2, 9, 16),)), ctx)
        assert any(why in str(miss) for miss in ctx.misses), ctx.misses
        assert ctx.rewrites == 2


@pytest.mark.parametrize("text", ["route_tokens(router='oracle')", "route_tokens(routed=0.0)", "route_tokens(first=-1)", "route_blocks(group=1)",
                                  "route_blocks(router='mean_weights')"])
def test_options_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ParseError):
        sc.Pipeline.parse(text)


def test_a_router_learns_by_its_sigmoid_and_not_by_ones() -> None:
    for weight, learns in (("sigmoid", True), ("one", False)):
        x = torch.randn(2, 10, 16)
        module, _ = sc.attach(blocks(), (x,), f"route_tokens(density=0.5, router='random', weight='{weight}')", calibration=[(x,)])
        module(x).square().sum().backward()
        grads = [parameter.grad for name, parameter in module.named_parameters() if "router" in name]
        assert len(grads) == 3
        assert all((grad is not None and bool(grad.ne(0).any())) == learns for grad in grads)


@pytest.mark.parametrize("router", ["ridge", "random"])
def test_one_router_may_serve_all_blocks(router: str) -> None:
    """It has one weight, fitted to the rows of all blocks, and learns by all of them."""
    x, text = torch.randn(2, 10, 16), f"route_tokens(density=0.5, routed=0.75, router='{router}', weight='sigmoid', first=1, common={{}})"
    one, _, _ = routed(blocks(), (x,), text.format(True))
    each, _, _ = routed(blocks(), (x,), text.format(False))
    weights = [[value for key, value in instantiate(program).state_dict().items() if "router.weight" in key] for program in (one, each)]
    assert [len(found) for found in weights] == [1, 3]
    if router == "ridge":
        assert not any(torch.equal(weights[0][0], own) for own in weights[1])
    module, _ = sc.attach(blocks(), (x,), text.format(True), calibration=[(x,)])
    module(x).square().sum().backward()
    whole = next(one.grad for name, one in module.named_parameters() if "router.weight" in name)
    assert whole is not None
    assert bool(whole.ne(0).any())


def test_blocks_of_another_width_have_a_router_of_their_own() -> None:
    x, model = torch.randn(2, 10, 16), nn.Sequential(blocks(2), nn.Linear(16, 32), Block(32, 4), Block(32, 4)).eval()
    for router in ("ridge", "random"):
        program, _, misses = routed(model, (x,), f"route_tokens(density=0.5, routed=1.0, router='{router}', common=True)")
        weights = [value for key, value in instantiate(program).state_dict().items() if "router.weight" in key]
        assert [weight.shape[-1] for weight in weights] == [16, 32], misses


class Marked(nn.Module):
    """Blocks over tokens of which some are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks(2)

    def forward(self, x: Tensor, mark: Tensor) -> Tensor:
        found: Tensor = self.blocks(x) + 0 * mark[..., None]
        return found


@settings(max_examples=40, derandomize=True, deadline=None)
@drawn(st.integers(1, 12), st.floats(0.0, 1.0), st.floats(0.01, 1.0), st.integers(0, 99))
def test_marked_tokens_come_before_all_others_in_their_order(tokens: int, marked: float, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    scores, mark = torch.randn(3, tokens) * 10, torch.rand(3, tokens) < marked
    for text, own, index in zip(scores, mark, top_tokens.op(_first(scores, mark), share), strict=True):
        order = sorted(range(tokens), key=lambda at, own=own, text=text: (not own[at], -text[at]))  # type: ignore[misc]
        assert set(index.tolist()) == set(order[: len(index)])


def test_marked_tokens_run_through_every_block_and_others_may_pass() -> None:
    x, mark = torch.randn(2, 10, 16), torch.zeros(2, 10).index_fill_(1, torch.tensor([3, 7]), 1)
    recipe = sc.Pipeline.parse("route_tokens(density=0.2, routed=1.0, router='random', keep='mark')")
    dynamic = {"x": {0: "b", 1: "t"}, "mark": {0: "b", 1: "t"}}
    module = instantiate(recipe.run(capture(Marked().eval(), (x, mark), dynamic), Context()))
    for rows in (x, torch.randn(2, 8, 16)):
        own = mark[:, : rows.shape[1]]
        same = (module(rows, own) == rows).all(-1)
        assert torch.equal(same, own == 0)


def test_without_such_an_input_it_says_so() -> None:
    x, mark = torch.randn(2, 9, 16), torch.ones(2, 9)
    for name, own in (("nowhere", mark), ("mark", torch.ones(2, 1))):
        ctx = Context()
        sc.Pipeline.parse(f"route_tokens(density=0.5, routed=1.0, router='random', keep='{name}')").run(capture(Marked().eval(), (x, own)), ctx)
        assert [f"no input {name} of [2, 9]" in str(miss) for miss in ctx.misses] == [True, True]


def test_scores_come_to_tell_by_themselves_what_was_chosen() -> None:
    """Gamma-MoD: the loss is the cross entropy with the choice; half of the tokens lie above 0 when it is learnt."""
    torch.manual_seed(0)
    x = torch.randn(8, 20, 16)
    module, hook = sc.attach(blocks(), (x,), sc.recipes.gamma_mod(density=0.6, routed=0.75, first=1, loss=1.0), calibration=[(x,)])
    program, _, _ = routed(blocks(), (x,), "gamma_mod(density=0.6)")
    module(x)
    assert "in training penalise_routing" in program.text()
    first = float(hook.loss().detach())
    optimizer = torch.optim.Adam([one for name, one in module.named_parameters() if "router" in name], 0.05)
    for _ in range(60):
        module(x)
        optimizer.zero_grad(), hook.loss().backward(), optimizer.step(), hook.step(optimizer)
    module(x)
    assert float(hook.loss().detach()) < 0.7 * first


def test_what_was_chosen_is_predicted_by_its_formula() -> None:
    loss, scores = Named.parse("router loss", "predicted"), torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    wanted = -(torch.tensor([2.0, 0.5, 3.0]).sigmoid().log().sum() + (1 - torch.tensor([-1.0, 0.0, -2.0]).sigmoid()).log().sum()) / 6
    torch.testing.assert_close(loss(scores, torch.tensor([[0, 2], [1, -1]])), wanted)


# --- texts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5])
def test_a_text_runs_through_the_blocks_that_it_chose(count: int) -> None:
    model, x = blocks(), torch.randn(8, 10, 16)
    program, module, _ = routed(model, (x,), "route_blocks(density=0.5)", DYNAMIC)
    given = torch.randn(count, 10, 16)
    chosen = scores_of(program, 0, given.mean(1)).topk(2, -1).indices
    expected = []
    for text, own in zip(given, chosen.tolist(), strict=True):
        stream = text[None]
        for block in sorted(own):
            stream = model[block](stream)
        expected.append(stream)
    torch.testing.assert_close(module(given), torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_text_alone_leaves_out_whole_blocks_when_compiled_saved_and_loaded(tmp_path: Any) -> None:
    model, batches = blocks(), [(torch.randn(4, 10, 16),) for _ in range(3)]
    made = sc.compile(model, batches[0], recipe="route_blocks(density=0.5, group=2)", target="cpu", calibration=batches, dynamic=DYNAMIC)
    alone = torch.randn(1, 6, 16)
    with torch.no_grad():
        found = made(alone)
    runs = [model[a](model[b](alone)) for b in (0, 1) for a in (2, 3)]
    assert any(torch.allclose(found, one, atol=1e-4) for one in runs)
    made.save(tmp_path / "made")
    torch.testing.assert_close(sc.load(tmp_path / "made")(alone), found)


def test_dense2moe_routes_blocks_beside_experts_and_trains() -> None:
    x = torch.randn(4, 10, 16)
    recipe = sc.recipes.dense2moe(experts=4, density=0.5, depth=0.5, group=2)
    module, hook = sc.attach(blocks(), (x,), recipe, calibration=[(x,)], dynamic=DYNAMIC)
    (module(x).square().mean() + hook.loss()).backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if "router.weight" in name}
    learns = [name for name, grad in grads.items() if grad is not None and bool(grad.ne(0).any())]
    assert len(grads) == 6  # of four FFNs and two groups
    assert sum("ffn" not in name for name in learns) == 2
    assert sum("ffn" in name for name in learns) >= 2  # a block that no text chose learns nothing


def test_mixture_of_depths_skips_ffns_token_by_token_in_generate() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
    prompt = {"input_ids": torch.randint(1, 64, (2, 12))}
    after, module, _ = routed(model, prompt, "mixture_of_depths(density=0.5)", {"input_ids": {0: "batch", 1: "tokens"}})
    assert [row.density for row in after.decisions.values()] == [pytest.approx(0.5, abs=0.05)] * 2
    whole, _, _ = routed(model, prompt, "mixture_of_depths(density=1.0)", {"input_ids": {0: "batch", 1: "tokens"}})
    torch.testing.assert_close(instantiate(whole)(**prompt).logits, model(**prompt).logits)
    assert not torch.allclose(module(**prompt).logits, model(**prompt).logits)
    made = [module.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made), "what a token runs through depends on it alone"
    assert made[0].shape == (2, 18)
