"""Gates of channels: shut from the start, learnt, and in the end a smaller dense model with the same values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from training_help import assert_resumes

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import InputError, ParseError, UnknownNameError
from sparsify_compiler.masked import gate_products
from sparsify_compiler.passes.prune.gate_channels import GateChannels
from sparsify_compiler.passes.prune.gate_positions import GatePositions
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train.choosers._base import Choice
from sparsify_compiler.passes.train.choosers.sigmoid import Sigmoid
from sparsify_compiler.passes.train.weight_losses.orthonormal import orthonormal
from sparsify_compiler.passes_api import Context
from sparsify_compiler.training import Hook

IDS = torch.randint(0, 40, (6, 5), generator=torch.Generator().manual_seed(1))
WANTED = torch.randint(0, 40, (6, 5), generator=torch.Generator().manual_seed(2))
SMALLER = "merge_adapters() | drop_dead_channels() | fold_scale()"


class Language(nn.Module):
    """A stream of 16 features between a table and a head, with two FFNs behind RMSNorms (or LayerNorms)."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.table, self.head, self.last = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False), norm(16)
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": norm(16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(2))
        for one in self.modules():
            if isinstance(one, norm):
                nn.init.uniform_(one.weight, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer["down"](functional.gelu(layer["up"](layer["norm"](x))))  # type: ignore[index]
        y: Tensor = self.head(self.last(x))
        return y


def language(norm: type[nn.Module] = nn.RMSNorm) -> nn.Module:
    torch.manual_seed(0)
    return Language(norm).eval()


def step(module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer) -> float:
    loss = functional.cross_entropy(module(IDS).flatten(0, 1), WANTED.flatten()) + hook.loss()
    loss.backward()
    optimizer.step()
    hook.step(optimizer)
    optimizer.zero_grad()
    return float(loss.detach())


def attached(recipe: str | sc.Pipeline, rate: float = 1e-2) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module, hook = sc.attach(language(), (IDS,), recipe)
    return module, hook, torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], rate, weight_decay=0)


def smaller(module: nn.Module) -> nn.Module:
    return instantiate(sc.Pipeline.parse(SMALLER).run(sc.capture(module.eval(), (IDS,))))


def gates(module: nn.Module) -> Tensor:
    return next(one for name, one in module.named_buffers() if name.endswith("_mask"))


def test_a_stream_has_one_mask_and_gates_that_are_open_change_nothing() -> None:
    program = sc.Pipeline.parse("gate_channels(density=0.75, targets=('stream',), sides='writers')").run(sc.capture(language(), (IDS,)))
    (region,) = program.regions.values()
    ((product, _),) = gate_products(region)
    assert len(product.users) == 3
    module = instantiate(program)
    mask = gates(module)
    assert int(mask.sum()) == 12
    with torch.no_grad():
        mask.fill_(True)
        torch.testing.assert_close(module(IDS), language()(IDS))


def test_pat_ends_as_a_smaller_dense_model_with_the_same_values() -> None:
    module, hook, optimizer = attached(sc.recipes.pat(0.75, rank=2, mixing=4, steps=20))
    start, losses = gates(module).clone(), [step(module, hook, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert int(gates(module).sum()) == 12
    assert not torch.equal(start, gates(module)), "nothing was learnt"
    found = smaller(module)
    shapes = {name: tuple(one.shape) for name, one in found.named_parameters()}
    assert sorted(shape for shape in shapes.values() if len(shape) == 2) == sorted([(40, 12), (40, 12), (32, 12), (32, 12), (12, 32), (12, 32)]) or \
        {16} & {size for shape in shapes.values() for size in shape} == set()
    assert not [one for one in found.buffers() if one.dtype == torch.bool]
    with torch.no_grad():
        torch.testing.assert_close(found(IDS), module(IDS), rtol=1e-4, atol=1e-5)


def test_only_adapters_and_scores_train_and_scores_do_move() -> None:
    module, hook, optimizer = attached(sc.recipes.pat(0.5, rank=2, mixing=4, steps=20))
    before = {name: one.detach().clone() for name, one in module.named_parameters()}
    for _ in range(4):
        step(module, hook, optimizer)
    moved = {name for name, one in module.named_parameters() if not torch.equal(one, before[name])}
    assert moved
    assert all("mixing_" in name or "low_rank_" in name or "scores" in name for name in moved)
    assert any("scores" in name for name in moved)
    assert {name for name in moved if "mixing_" in name} == {f"layers.{i}.down.mixing_{part}" for i in (0, 1) for part in ("reads", "writes")}


def test_the_identity_loss_makes_rows_orthonormal() -> None:
    """Alone, with its weight; without it they do not become so."""
    sizes = {}
    for weight in (10.0, 0.0):
        module, hook, optimizer = attached(sc.recipes.pat(0.75, rank=2, mixing=4, steps=50, identity=weight), 2e-2)
        for _ in range(60):
            step(module, hook, optimizer)
        sizes[weight] = float(orthonormal([one.detach() for name, one in module.named_parameters() if name.endswith("mixing_reads")], 0))
    assert sizes[10.0] < 0.02 < sizes[0.0]


def test_a_run_that_is_resumed_is_the_same_to_the_bit() -> None:
    assert_resumes(partial(attached, sc.recipes.pat(0.75, rank=2, mixing=4, steps=6)), step, 3, 4)


def test_features_under_a_layer_norm_stay() -> None:
    """Its mean would be of fewer."""
    program = sc.Pipeline.parse("gate_channels(density=0.75, targets=('stream',), sides='writers') | drop_dead_channels()").run(
        sc.capture(language(nn.LayerNorm), (IDS,)))
    assert instantiate(program).get_parameter("table.weight").shape == (40, 16)


@pytest.mark.parametrize("act", [nn.GELU(), nn.Sigmoid()])
def test_neurons_that_are_shut_go_where_nothing_becomes_of_zero(act: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), act, nn.Linear(12, 4)).eval()
    x = torch.randn(5, 8)
    gated = sc.Pipeline.parse("gate_channels(density=0.5)").run(sc.capture(model, (x,)))
    found = instantiate(sc.Pipeline.parse("drop_dead_channels() | fold_scale()").run(gated))
    assert found.get_parameter("2.weight").shape[1] == (12 if isinstance(act, nn.Sigmoid) else 6)
    with torch.no_grad():
        torch.testing.assert_close(found(x), instantiate(gated)(x))


def test_filters_have_gates_and_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).eval()
    x = torch.randn(2, 1, 14, 14)
    gated = sc.Pipeline.parse("gate_channels(density=0.5)").run(sc.capture(model, (x,)))
    found = instantiate(sc.Pipeline.parse("drop_dead_channels() | fold_scale()").run(gated))
    assert sorted(one.shape[0] for one in found.parameters() if one.dim() == 4) == [3, 4]
    with torch.no_grad():
        torch.testing.assert_close(found(x), instantiate(gated)(x), rtol=1e-4, atol=1e-5)


def test_places_are_shut_in_all_filters_and_are_learnt() -> None:
    """The image is empty in its left half: what is learnt lies in the right one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)).eval()
    x = torch.zeros(16, 1, 8, 8)
    x[:, :, :, 4:] = torch.randn(16, 1, 8, 4)
    wanted = (x.sum((1, 2, 3)) > 0).long()
    module, hook = sc.attach(model, (x,), sc.recipes.sparse_places(0.5, steps=30))
    mask = gates(module)
    assert tuple(mask.shape) == (1, 1, 8, 8)
    assert int(mask.sum()) == 32
    before = int(mask[..., 4:].sum())
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 2e-2, weight_decay=0)
    for _ in range(40):
        (functional.cross_entropy(module(x), wanted) + hook.loss()).backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    assert int(mask.sum()) == 32
    assert int(mask[..., 4:].sum()) > before
    assert any(one.dim() == 4 and one.shape[0] == 4 and one.requires_grad for one in module.parameters())


def places(model: nn.Module, x: Tensor, dynamic: object = None, **options: object) -> tuple[dict[str, Tensor], Context]:
    """The masks of gate_positions, and its misses."""
    ctx = Context(example_inputs=(x,))
    program = GatePositions(**options).run(sc.capture(model.eval(), (x,), dynamic), ctx)  # type: ignore[arg-type]
    return {name: one for name, one in instantiate(program).named_buffers() if name.endswith("_mask")}, ctx


def test_images_of_one_size_lose_the_same_places_and_never_all() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3)), torch.randn(2, 1, 8, 8)
    first, second, third = places(model, x, density=0.3)[0].values()
    assert torch.equal(first, second)
    assert int(first.sum()) == round(0.3 * 64)
    assert tuple(third.shape) == (1, 1, 6, 6)
    assert int(third.sum()) == round(0.3 * 36)
    assert not torch.equal(first, places(model, x, density=0.3, seed=1)[0]["gates_0_mask"])
    assert torch.equal(first, places(model, x, density=0.3)[0]["gates_0_mask"])
    assert [int(one.sum()) for one in places(model, x, density=0.001)[0].values()] == [1, 1, 1]
    half, _ = sc.attach(model.bfloat16().eval(), (x.bfloat16(),), GatePositions(0.5))
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_images_whose_places_are_not_known_or_one_keep_them() -> None:
    x = torch.randn(2, 1, 8, 8)
    for model, one, dynamic, why in ((nn.Conv2d(1, 4, 8), x, None, "a single place"), (nn.Conv2d(1, 4, 3), x[0], None, "no batch"),
                                     (nn.Conv2d(1, 4, 3), x, {"input": {2: "height"}}, "not fixed"), (nn.Linear(8, 4), x, None, "no convolution")):
        masks, ctx = places(model, one, dynamic, density=0.5)
        assert not masks
        assert why in str(ctx.misses[0])


class Heads(nn.Module):
    """Attention of four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def test_heads_have_no_gates_for_their_channels_do_not_lie_side_by_side() -> None:
    ctx = Context(example_inputs=(torch.randn(2, 5, 16),))
    program = GateChannels(density=0.5, targets=("heads",)).run(sc.capture(Heads().eval(), ctx.example_inputs), ctx)
    assert "heads do not lie side by side" in str(ctx.misses[0])
    assert ctx.rewrites == 0
    assert not [name for name, _ in instantiate(program).named_buffers()]


def test_gates_have_the_dtype_of_what_they_multiply() -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).bfloat16().eval(), torch.randn(5, 8).bfloat16()
    module, _ = sc.attach(model, (x,), "gate_channels(density=0.5)")
    gate = next(one for name, one in module.named_parameters() if name.startswith("gates"))
    assert gate.dtype == module(x).dtype == torch.bfloat16


def test_a_sum_with_a_number_is_not_silent() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.up(x) + 1)
            return y

    torch.manual_seed(0)
    x = torch.randn(5, 8)
    gated = sc.Pipeline.parse("gate_channels(density=0.5)").run(sc.capture(Shifted().eval(), (x,)))
    found = instantiate(sc.Pipeline.parse("drop_dead_channels()").run(gated))
    with torch.no_grad():
        torch.testing.assert_close(found(x), instantiate(gated)(x))
    assert found.get_parameter("down.weight").shape[1] == 12


def test_the_chooser_keeps_as_many_as_are_asked_for_and_becomes_a_step() -> None:
    scores = torch.randn(1, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    chooser, choice = Sigmoid(), Choice(Structure.parse("unstructured"), 0.3)
    mask = chooser.mask(scores, torch.ones(1, 20, dtype=torch.bool), choice)
    assert int(mask.sum()) == 6
    assert bool((scores[mask].min() > scores[~mask].max()).all())
    soft = {p: chooser.soft(scores, mask, Choice(choice.structure, 0.3, p)) for p in (0.0, 0.5, 1.0)}
    assert bool((soft[0.0] > 0.55).all())
    assert bool(((soft[1.0] > 0.5) == mask).all())
    away = [float((soft[p] - mask.float()).abs().mean()) for p in (1.0, 0.5, 0.0)]
    assert away == sorted(away)


@pytest.mark.parametrize("open_", [True, False])
def test_where_all_gates_are_open_or_shut_training_sees_that_too(open_: bool) -> None:
    scores = torch.randn(1, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float32).requires_grad_()
    soft = Sigmoid().soft(scores, torch.full((1, 20), open_), Choice(Structure.parse("unstructured"), float(open_), 1.0))
    assert bool(((soft > 0.99) == open_).all())
    assert bool(((soft < 0.01) != open_).all())
    (gradient,) = torch.autograd.grad(soft.sum(), scores)
    assert bool(gradient.any())


class Stem(nn.Module):
    """What a convolution makes of an image is a stream that a linear layer adds to, as in a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.up, self.down, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(x + self.down(self.up(x).relu()))
        return y


def test_units_that_convolutions_and_linears_make_have_no_gates() -> None:
    ctx = Context(example_inputs=(torch.randn(2, 3, 8, 8),))
    program = GateChannels(density=0.5, targets=("stream", "neurons")).run(sc.capture(Stem().eval(), ctx.example_inputs), ctx)
    assert "made as channels of images and as features" in " ".join(map(str, ctx.misses))
    (region,) = program.regions.values()
    assert [gate for _, gate in gate_products(region)] == ["gates_neurons"]


class Twice(nn.Module):
    """Two FFNs in graphs of their own, for there is Python between them, whose neurons one weight makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))
        self.second[0].weight = self.first[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.second(x if float(x.sum()) < 1e9 else -x)
        return y


def test_units_that_are_made_in_several_graphs_have_no_gates() -> None:
    ctx = Context(example_inputs=(torch.randn(5, 8),))
    program = GateChannels(density=0.5).run(sc.capture(Twice().eval(), ctx.example_inputs), ctx)
    assert list(program.regions) == ["first", "second"]
    assert "12 neurons are made in several graphs" in " ".join(map(str, ctx.misses))
    assert not [name for name, _ in instantiate(program).named_buffers()]


def test_units_without_a_batch_before_them_have_no_gates() -> None:
    """A gate is [1, units]: what it is multiplied with would have a dimension more."""
    model, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), torch.randn(8)
    ctx = Context(example_inputs=(x,))
    gated = instantiate(GateChannels(density=0.5).run(sc.capture(model, (x,)), ctx))
    assert "12 neurons do not lie side by side" in " ".join(map(str, ctx.misses))
    assert gated(x).shape == (4,)


class Halves(nn.Module):
    """Two matrices that are one parameter, of whose products the other reads the first half of the units alone."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Parameter(torch.randn(24, 8)), nn.Linear(12, 4)
        with torch.no_grad():
            self.both[:2] = 0
            self.down.weight[:, -3:] = 0

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.both.chunk(2)
        y: Tensor = self.down(functional.linear(x, one).relu() * functional.linear(x, other))
        return y


def test_units_of_a_parameter_that_is_split_are_found() -> None:
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(5, 8)
    found = instantiate(sc.Pipeline.parse("drop_dead_channels()").run(sc.capture(model, (x,))))
    assert found.get_parameter("down.weight").shape == (4, 7)
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x))


def test_bad_input_is_told() -> None:
    with pytest.raises(ParseError, match="repair"):
        GateChannels(repair="least_squares")
    with pytest.raises(UnknownNameError):
        GateChannels(adapter="mixture")
    with pytest.raises(InputError, match="steepness"):
        sc.Pipeline.parse("learn_masks(chooser='sigmoid(steepness=(0.0, 1.0))', of='gates')")
    with pytest.raises(ParseError, match="'weights' or 'gates'"):
        sc.Pipeline.parse("learn_masks(of='heads')")




class Beside(nn.Module):
    """Two layers' units beside each other, as one linear layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.down = nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.cat([self.one(x).relu(), self.other(x).tanh()], -1))
        return y


def test_units_that_lie_beside_those_of_another_group_go() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    gated = sc.Pipeline.parse("gate_channels(density=0.5)").run(sc.capture(Beside().eval(), (x,)))
    found = instantiate(sc.Pipeline.parse("drop_dead_channels()").run(gated))
    assert [found.get_parameter(f"{name}.weight").shape for name in ("one", "other", "down")] == [(3, 8), (5, 8), (4, 8)]
    with torch.no_grad():
        torch.testing.assert_close(found(x), instantiate(gated)(x))


class Named(nn.Module):
    """One of its layers is called as all of them are selected."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.down = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.linear(x).relu())
        return y


def test_adapters_are_behind_the_layers_that_have_gates_alone() -> None:
    module, _ = sc.attach(Named().eval(), (torch.randn(5, 8),), "gate_channels(density=0.5, adapter='mixing(rank=2)')")
    assert [name for name, _ in module.named_parameters() if "mixing" in name] == ["linear.mixing_reads", "linear.mixing_writes"]


class Again(nn.Module):
    """One layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x).relu())
        return y


def test_a_weight_that_is_read_twice_counts_once() -> None:
    module, hook = sc.attach(Again().eval(), (torch.randn(5, 8),), "penalise_weights(loss='orthonormal', weight=2.0, masked=False)")
    torch.testing.assert_close(hook.loss(), 2 * orthonormal([module.get_parameter("layer.weight")], 0))


def left(model: nn.Module) -> int:
    """Features of the stream that stay, after a look at the values."""
    found = instantiate(sc.Pipeline.parse("drop_dead_channels()").run(sc.capture(model, (IDS,))))
    with torch.no_grad():
        torch.testing.assert_close(found(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    return found.get_parameter("table.weight").shape[1]


def test_features_go_where_all_that_write_them_write_zeros() -> None:
    model = language()
    with torch.no_grad():
        model.get_parameter("table.weight")[:, :4] = 0
        assert left(model) == 16
        for i in (0, 1):
            model.get_parameter(f"layers.{i}.down.weight")[:4] = 0
            model.get_parameter(f"layers.{i}.down.bias")[:4] = 0
        assert left(model) == 12
        model.get_parameter("layers.0.down.weight")[0, 5] = 1
        assert left(model) == 13
        model.get_parameter("layers.1.down.bias")[1] = 1
        assert left(model) == 14


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_features_that_nobody_reads_stay_where_a_norm_is_over_them(norm: type[nn.Module]) -> None:
    """An rms_norm sees what they are, a layer_norm how many."""
    model = language(norm)
    with torch.no_grad():
        for name in ("layers.0.up", "layers.1.up", "head"):
            model.get_parameter(f"{name}.weight")[:, :4] = 0
        assert left(model) == 16
        model.get_parameter("table.weight")[:, :4] = 0
        for i in (0, 1):
            model.get_parameter(f"layers.{i}.down.weight")[:4] = 0
            model.get_parameter(f"layers.{i}.down.bias")[:4] = 0
        assert left(model) == (12 if norm is nn.RMSNorm else 16)
