"""Adapters and subsets: only they train, zeros stay, merging gives the same numbers, and what is packed is as small as the subset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import BudgetError, ParseError, SelectorError, StructureError, UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.train.add_adapters import AddAdapters
from sparsify_compiler.program import Program, get_tensor
from sparsify_compiler.training import Hook

X = torch.randn(32, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
MASKED = "mask_weights(structure='row', density=0.5)"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def train(recipe: str | sc.Pipeline, steps: int = 12) -> tuple[nn.Module, Hook, list[float]]:
    module, hook = sc.attach(net(), (X,), recipe, calibration=[(X,)])
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 3e-2)
    losses = []
    for _ in range(steps):
        loss = functional.mse_loss(module(X), Y) + hook.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    return module, hook, losses


def merged(module: nn.Module) -> Program:
    return sc.Pipeline.parse("merge_adapters()").run(sc.capture(module, (X,)))


def linears(program: Program) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and mask of each linear of a program, in order."""
    found = []
    for region, node in program.nodes():
        if str(node.target) == "aten.linear.default":
            sources = [one for one in node.kwargs["weight"].all_input_nodes or [node.kwargs["weight"]] if one.op == "get_attr"]
            tensors = [get_tensor(region.module, str(one.target)) for one in sources]
            found.append((next(t for t in tensors if t.dtype != torch.bool), next((t for t in tensors if t.dtype == torch.bool), None)))
    return found


@pytest.mark.parametrize("base", ["", MASKED])
@pytest.mark.parametrize("added", ["add_adapters('masked_low_rank(rank=3, scale=0.5)')", "add_adapters('row_by_column')",
                                   "train_subset(density=0.2)", "train_subset(structure='4x4', density=0.25, score='random')"])
def test_only_what_was_added_trains_and_it_merges(base: str, added: str) -> None:
    """Into one linear for each; where a mask was, the same mask."""
    added = added.replace("add_adapters(", "add_adapters(adapter=")
    module, _, losses = train(f"{base} | {added}" if base else added)
    assert losses[-1] < losses[0]
    before = dict(net().named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name not in before)
        assert name not in before or torch.equal(parameter, before[name])
    program = merged(module)
    with torch.no_grad():
        torch.testing.assert_close(instantiate(program)(X), module(X), rtol=1e-4, atol=1e-5)
    found = linears(program)
    assert len(found) == 2
    if base:
        for (weight, mask), layer in zip(found, ("0", "2"), strict=True):
            kept = sc.attach(net(), (X,), MASKED)[1].masks[layer]
            assert mask is not None
            assert torch.equal(mask, kept)
            assert not torch.equal(weight * mask, before[f"{layer}.weight"] * kept)


def test_a_change_beside_a_mask_is_not_merged() -> None:
    """DSEE's, which would fill the zeros."""
    module, _, losses = train(f"{MASKED} | add_adapters(adapter='low_rank(rank=2)')")
    assert losses[-1] < 0.9 * losses[0]
    assert len(linears(merged(module))) == 6
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == [
        f"{layer}.low_rank_{kind}" for layer in ("0", "2") for kind in ("reads", "writes")]


def test_a_packed_subset_is_all_that_the_optimizer_sees() -> None:
    """As with masks, number for number."""
    recipe = "train_subset(density=0.1, score='random') | move_masks(grow='gradient', structure='unstructured', every=4, until=8)"
    _, hook, losses = train(recipe)
    module, packed, again = train(f"{recipe} | pack()")
    assert again == pytest.approx(losses, rel=1e-4)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert [one.numel() for one in trained] == [-(-24 * 32 // 10), -(-32 * 8 // 10)]
    for name, weight in hook.weights().items():
        torch.testing.assert_close(packed.weights()[name], weight, rtol=1e-3, atol=1e-4)


OVER_ADAPTERS = {"sqft": sc.recipes.sqft(0.5, rank=2), "pst": sc.recipes.pst(0.5, rank=2, scores=2, steps=6),
                 "spp": sc.Pipeline.parse(f"{MASKED} | add_adapters(adapter='row_by_column')")}


@pytest.mark.parametrize("recipe", OVER_ADAPTERS.values(), ids=OVER_ADAPTERS)
def test_a_hook_knows_masks_and_weights_that_adapters_are_a_part_of(recipe: sc.Pipeline) -> None:
    """As they are by now: what a dense layer would need to do the same."""
    torch.manual_seed(0)
    module, hook = sc.attach(net(), (X,), recipe, calibration=[(X,)])
    assert set(hook.masks) == {"0", "2"}
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 1e-2, weight_decay=0)
    for _ in range(8):
        (module(X).square().mean() + hook.loss()).backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    dense, biases = hook.weights(), dict(net().named_parameters())
    for name, mask in hook.masks.items():
        assert mask is module.get_buffer(f"{name}.weight_mask")
        assert not bool(dense[name][~mask].any())
        assert float(mask.double().mean()) == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        expected = functional.linear(functional.relu(functional.linear(X, dense["0"], biases["0.bias"])), dense["2"], biases["2.bias"])
        torch.testing.assert_close(module(X), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(dense["2"], biases["2.weight"] * hook.masks["2"])


def test_a_subset_lies_inside_of_the_mask() -> None:
    """As many places as were asked for, whatever the score says of those that are not kept."""
    _, hook = sc.attach(net(), (X,), f"{MASKED} | train_subset(density=0.25, score='random')")
    for layer, size in (("0", 24 * 32), ("2", 32 * 8)):
        change = hook.masks[f"{layer}.change"]
        assert not bool((change & ~hook.masks[layer]).any())
        assert int(change.sum()) == size // 4


def test_biases_train_where_nothing_is_frozen_and_the_change_has_its_scale() -> None:
    module, _ = sc.attach(net(), (X,), "add_adapters(adapter='low_rank(rank=2, scale=0.5)', freeze=False)")
    assert all(parameter.requires_grad for parameter in module.parameters())
    whole, _ = sc.attach(net(), (X,), "add_adapters(adapter='low_rank(rank=2)')")
    before = net()(X)
    for one in (module, whole):
        one.get_parameter("2.low_rank_writes").data.fill_(1.0)
    torch.testing.assert_close(module(X) - before, 0.5 * (whole(X) - before), rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_weight_share_what_is_added() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.one(functional.relu(self.one(x)))
            return y

    torch.manual_seed(0)
    model = Tied().eval()
    for added in ("add_adapters()", "add_adapters(adapter='low_rank')", "train_subset()"):
        module, _ = sc.attach(model, (X,), added)
        torch.testing.assert_close(module(X), model(X))
        assert sum(parameter.requires_grad for parameter in module.parameters()) == (1 if "subset" in added else 2)


def test_networks_behind_layers_are_cut_before_they_train() -> None:
    """Over all of them together; and where they give nothing the layer gives what it gave."""
    module, hook, losses = train(sc.recipes.sparse_adapter(0.4, 8))
    assert losses[-1] < losses[0]
    masks = hook.masks
    assert sorted(masks) == [f"{layer}.bottleneck_{kind}" for layer in ("0", "2") for kind in ("reads", "writes")]
    sizes = sum(mask.numel() for mask in masks.values())
    assert sizes == 2 * 8 * (32 + 8)
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(0.4 * sizes, abs=1)
    before = dict(net().named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name not in before)
        assert name not in before or torch.equal(parameter, before[name])
    with torch.no_grad():
        for layer in ("0", "2"):
            module.get_parameter(f"{layer}.bottleneck_writes").zero_()
        torch.testing.assert_close(module(X), net()(X))


def test_a_bottleneck_is_its_formula() -> None:
    module, _ = sc.attach(net(), (X,), "add_adapters(adapter='bottleneck(rank=3, scale=0.5, activation=\\'gelu\\', spread=0.3)')")
    parameters = dict(module.named_parameters())
    y = X
    for layer in ("0", "2"):
        y = functional.linear(functional.relu(y) if layer == "2" else y, parameters[f"{layer}.weight"], parameters[f"{layer}.bias"])
        inner = functional.gelu(functional.linear(y, parameters[f"{layer}.bottleneck_reads"]))
        y = y + 0.5 * functional.linear(inner, parameters[f"{layer}.bottleneck_writes"])
    torch.testing.assert_close(module(X), y)


@pytest.mark.parametrize(("experts", "rank", "chosen"), [(3, 2, 1), (6, 1, 2), (2, 4, 2)])
def test_routed_experts_are_the_sum_over_the_chosen(experts: int, rank: int, chosen: int) -> None:
    recipe = f"add_adapters(adapter='routed_low_rank(experts={experts}, rank={rank}, chosen={chosen}, scale=0.5)', targets=('2',))"
    module, _, losses = train(recipe)
    assert losses[-1] < losses[0]
    parameters = {name: one.detach() for name, one in module.named_parameters()}
    reads, writes, route = (parameters[f"2.routed_low_rank_{kind}"] for kind in ("reads", "writes", "route"))
    x = functional.relu(functional.linear(X, parameters["0.weight"], parameters["0.bias"]))
    odds = functional.linear(x, route).softmax(-1)
    wanted = functional.linear(x, parameters["2.weight"], parameters["2.bias"])
    for row in range(len(x)):
        for expert in odds[row].topk(chosen).indices:
            part = slice(int(expert) * rank, (int(expert) + 1) * rank)
            wanted[row] += 0.5 * odds[row, expert] * (writes[:, part] @ (reads[part] @ x[row]))
    with torch.no_grad():
        torch.testing.assert_close(module(X), wanted, rtol=1e-4, atol=1e-5)


def test_of_scores_that_are_alike_no_more_experts_are_used_than_were_asked_for() -> None:
    from sparsify_compiler.passes.train.adapters.routed_low_rank import _change

    x, reads, writes = torch.randn(5, 6), torch.randn(8, 6), torch.randn(3, 8)
    y = _change(x, reads, writes, torch.zeros(4, 6), rank=2, chosen=1, scale=1.0)
    each = torch.stack([0.25 * (x @ reads[i : i + 2].T) @ writes[:, i : i + 2].T for i in range(0, 8, 2)])
    assert bool((each - y).abs().amax(-1).lt(1e-5).any(0).all()), "every row is one expert's"


def test_bad_input() -> None:
    assert set(catalog.names("adapter")) == {"bottleneck", "group_sums", "low_rank", "masked_low_rank", "mixing", "routed_low_rank",
                                              "row_by_column"}
    for text, why in (("bottleneck(activation='tanhh')", "relu, gelu, silu"), ("bottleneck(spread=0.0)", "spread above 0"),
                      ("routed_low_rank(experts=2, chosen=3)", "3 of 2"), ("routed_low_rank(rank=0)", "1 or more")):
        with pytest.raises(ParseError, match=why):
            AddAdapters(text)
    with pytest.raises(ParseError, match="zero, principal"):
        AddAdapters("low_rank(start='svd')")
    with pytest.raises(ParseError, match="divides by scale"):
        AddAdapters("low_rank(start='principal', scale=0.0)")
    with pytest.raises(StructureError, match="leave its mask"):
        sc.attach(net(), (X,), f"{MASKED} | add_adapters(adapter=\"low_rank(start='principal')\")")
    with pytest.raises(ParseError, match="1 or more"):
        AddAdapters("low_rank(rank=0)")
    with pytest.raises(UnknownNameError):
        AddAdapters("lowrank")
    with pytest.raises(BudgetError):
        sc.Pipeline.parse("train_subset(density=0.0)")


def test_adapters_are_on_their_weights_device() -> None:
    weight = torch.ones(6, 4, dtype=torch.bfloat16, device="meta")
    for name in catalog.names("adapter"):
        for tensor in Named.parse("adapter", name)(weight, 0).tensors.values():
            assert (tensor.device, tensor.dtype) == (weight.device, weight.dtype)


def test_what_is_named_goes_on_training_beside_adapters() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)).eval()
    module, _ = sc.attach(model, (torch.randn(2, 16),), AddAdapters("low_rank(rank=2)", also=("1.*", "*.bias"), targets=("2",)))
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert trained == {"0.bias", "1.weight", "1.bias", "2.bias", "2.low_rank_reads", "2.low_rank_writes"}
    with pytest.raises(SelectorError, match=r"'1\.wieght' matches none of [0-9]+ parameters(.|\n)*1\.weight"):
        sc.attach(model, (torch.randn(2, 16),), AddAdapters("low_rank(rank=2)", also=("*.bias", "1.wieght"), targets=("2",)))


@pytest.mark.parametrize(("targets", "ignore", "names"), [
    (("ffn",), (), {"1", "3"}), (("ffn:down",), (), {"3"}), (("linear",), ("ffn:down",), {"0", "1"}), (("*",), ("ffn",), {"0"}), (("3",), (), {"3"})])
def test_adapters_are_where_selectors_of_ffns_and_of_layers_say(targets: tuple[str, ...], ignore: tuple[str, ...], names: set[str]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    module, _ = sc.attach(model, (torch.randn(2, 16),), AddAdapters("low_rank(rank=2)", targets=targets, ignore=ignore))
    assert {name.partition(".")[0] for name, value in module.named_parameters() if value.requires_grad} == names
