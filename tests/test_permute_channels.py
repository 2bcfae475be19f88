"""permute_channels: orders that keep more, the same values, and FFNs that are left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import zoo
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import BudgetError, ParseError
from sparsify_compiler.passes.moe._balance import clusters
from sparsify_compiler.passes.prune._permutation import _dealt, kept_score, search
from sparsify_compiler.passes.prune._row_order import kept_in_blocks, search_rows
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.permute_channels import PermuteChannels
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes_api import Context, Preserves
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves
from sparsify_compiler.program import Program, get_tensor

quick = settings(max_examples=40, derandomize=True, deadline=None)


@quick
@given(st.integers(1, 12), st.integers(1, 8), st.sampled_from([(2, 4), (1, 4), (1, 2), (4, 8), (3, 5)]), st.booleans(), st.integers(0, 99))
def test_an_order_is_a_permutation_and_keeps_no_less(rows: int, groups: int, sizes: tuple[int, int], ties: bool, seed: int) -> None:
    n, m = sizes
    rand = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 3, (rows, groups * m), generator=rand).float() if ties else torch.rand(rows, groups * m, generator=rand)
    order = search(score, n, m, 4, 8, seed)
    assert torch.equal(order.sort().values, torch.arange(groups * m))
    assert kept_score(score[:, order], n, m) >= kept_score(score, n, m)
    assert torch.equal(order, search(score, n, m, 4, 8, seed))
    assert kept_score(score, n, m) == pytest.approx(float(score[NM(n, m).mask(score, n / m)].sum()), rel=1e-5)


def test_what_can_be_kept_whole_is() -> None:
    """Half the columns are zero: some order keeps all the score."""
    score = torch.rand(32, 64)
    score[:, :32] = 0
    assert kept_score(score, 2, 4) < 0.75 * float(score.sum())
    assert kept_score(score[:, search(score, 2, 4, 4, 100, 0)], 2, 4) == pytest.approx(float(score.sum()), rel=1e-5)


def test_the_search_goes_beyond_dealing() -> None:
    """Columns of four kinds with nearly equal sums: a group should have one of each, which sums cannot tell. Swaps end in an optimum nearby."""
    rand = torch.Generator().manual_seed(1)
    kind = torch.arange(32) // 8
    score = torch.nn.functional.one_hot(kind, 4).T.float().repeat(4, 1) + 0.01 * torch.rand(16, 32, generator=rand)
    found = kept_score(score[:, search(score, 1, 4, 4, 100, 0)], 1, 4)
    assert kept_score(score, 1, 4) < 0.3 * float(score.sum())
    assert kept_score(score[:, _dealt(score, 4)], 1, 4) < 0.7 * float(score.sum())
    assert found > 0.9 * float(score.sum())


def test_few_rows_are_looked_at_and_the_result_still_keeps_no_less() -> None:
    score = torch.rand(300, 64) * torch.rand(64)
    base, few, all_rows = (kept_score(score[:, o], 2, 4) for o in (torch.arange(64), search(score, 2, 4, 4, 32, 0), search(score, 2, 4, 4, 1000, 0)))
    assert base < few <= all_rows * 1.001


def run(model: nn.Module, inputs: object, *passes: object, **context: object) -> tuple[Program, Program, Context]:
    program = capture(model, inputs)  # type: ignore[arg-type]
    ctx = Context(calibrate=lambda now, needs: calibrate(now, [inputs], needs, cache=False), **context)  # type: ignore[arg-type, list-item]
    return program, Pipeline(passes).run(program, ctx), ctx  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
@pytest.mark.parametrize("score", ["magnitude", "relative_importance"])
def test_models_compute_the_same(name: str, score: str) -> None:
    model, inputs, _ = getattr(zoo, name)()
    program, after, ctx = run(model, inputs, PermuteChannels(score))
    if name == "gpt2":  # its weights are stored transposed, so the graph computes them
        assert ctx.rewrites == 0
        assert all("computed" in miss.why for miss in ctx.misses)
        return
    assert ctx.rewrites == 2, [str(miss) for miss in ctx.misses]
    check_preserves(program, after, inputs, Preserves.VALUES)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_mask_keeps_more_than_without(name: str) -> None:
    model, inputs, _ = getattr(zoo, name)()
    kept = []
    for passes in ((), (PermuteChannels(),)):
        _, after, _ = run(model, inputs, *passes, MaskWeights(structure="2:4", targets=("ffn:down",)))
        pairs = [(str(n.target), r.module) for r, n in after.nodes() if n.op == "get_attr" and str(n.target).endswith("_mask")]
        kept.append(sum(float(get_tensor(m, t.removesuffix("_mask")).detach().abs()[get_tensor(m, t)].sum()) for t, m in pairs))
    assert kept[1] > 1.01 * kept[0]


class Fused(nn.Module):
    """Gate and up in one linear, with biases; `kind` spoils it in some way."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.gate_up, self.down, self.slope = nn.Linear(8, 32), nn.Linear(16, 8), nn.PReLU(16)
        self.up = nn.Linear(8, 16)
        self.other = nn.Linear(16, 8, bias=False)
        if kind == "tied":
            self.other.weight = self.down.weight
        with torch.no_grad():
            self.down.weight *= torch.linspace(0.1, 2, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "prelu":
            y: Tensor = self.down(self.slope(self.up(x).transpose(1, 2)).transpose(1, 2)) if x.dim() == 3 else self.down(self.slope(self.up(x)))
            return y
        if self.kind == "twice":
            return self.down(gelu(self.up(self.down(gelu(self.up(x))))))  # type: ignore[no-any-return]
        if self.kind == "shared bias":
            return self.down(gelu(self.up(x))) + self.up.bias[:8]  # type: ignore[no-any-return]
        if self.kind == "computed":
            return self.down(gelu(linear(x, self.up.weight * 2, self.up.bias)))  # type: ignore[no-any-return]
        if self.kind == "tied":
            return self.down(gelu(self.up(x))) + self.other(self.gate_up(x)[..., :16])  # type: ignore[no-any-return]
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(silu(gate) * up)  # type: ignore[no-any-return]


def test_fused_projections_are_reordered_in_both_halves() -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 8),)
    program, after, ctx = run(Fused().eval(), x, PermuteChannels())
    assert ctx.rewrites == 1
    check_preserves(program, after, x, Preserves.VALUES)
    before, now = (get_tensor(p.regions[""].module, "gate_up.weight") for p in (program, after))
    order = [(before[:16] == row).all(1).nonzero().item() for row in now[:16]]
    assert order != list(range(16))
    assert torch.equal(now[16:], before[16:][order])


@pytest.mark.parametrize(("kind", "words"), [
    ("prelu", "parameter for each channel"), ("twice", "used 2 times"), ("shared bias", "bias of its up projection"), ("computed", "computed"),
    ("tied", "tied"),
])
def test_what_cannot_be_reordered_is_left_alone(kind: str, words: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 8),)
    program, after, ctx = run(Fused(kind).eval(), x, PermuteChannels())
    assert any(words in miss.why for miss in ctx.misses), [str(miss) for miss in ctx.misses]
    assert ctx.rewrites == 0
    check_preserves(program, after, x, Preserves.VALUES)


@pytest.mark.parametrize(("build", "words"), [
    (lambda: nn.Sequential(nn.Linear(8, 18), nn.ReLU(), nn.Linear(18, 8)), "18 hidden channels do not divide into groups of 4"),
    (lambda: nn.Sequential(nn.Linear(8, 8)), "no FFN"),
    (lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)), "no order was found"),
])
def test_nothing_to_do(build: Callable[[], nn.Module], words: str) -> None:
    _, _, ctx = run(build().eval(), (torch.randn(2, 8),), PermuteChannels())
    assert [words in miss.why for miss in ctx.misses] == [True]
    assert ctx.rewrites == 0


def test_masked_ffns_and_other_structures_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), (torch.randn(2, 8),)
    _, _, ctx = run(model, x, MaskWeights(density=0.5), PermuteChannels())
    assert any("masked" in miss.why for miss in ctx.misses)
    for structure in ("row", "NM(n=2, m=4, along=outputs)"):
        with pytest.raises(ParseError, match="orders channels for N:M along inputs and for blocks"):
            PermuteChannels(structure=structure)


@quick
@given(st.integers(1, 6), st.sampled_from([2, 4, 8]), st.integers(1, 12), st.sampled_from([0.2, 0.5, 0.9]), st.booleans(), st.integers(0, 99))
def test_an_order_of_rows_is_a_permutation_and_keeps_no_less(groups: int, size: int, columns: int, density: float, ties: bool, seed: int) -> None:
    rand, shape = torch.Generator().manual_seed(seed), (groups * size, columns)
    scores = [torch.randint(0, 3, shape, generator=rand).float() if ties else torch.rand(shape, generator=rand) for _ in range(2)]
    order = search_rows(scores, size, density, 4, seed)
    assert torch.equal(order.sort().values, torch.arange(groups * size))
    assert kept_in_blocks([score[order] for score in scores], size, density) >= kept_in_blocks(scores, size, density)
    assert torch.equal(order, search_rows(scores, size, density, 4, seed))
    masks = [Block(size, 1).mask(score, density) for score in scores]
    kept = sum(float(one[mask].sum()) for one, mask in zip(scores, masks, strict=True))
    assert kept_in_blocks(scores, size, density) == pytest.approx(kept, rel=1e-5)


def test_rows_of_a_kind_come_together_and_all_is_kept() -> None:
    """Four kinds of rows, each with its own quarter of the inputs, shuffled: at a quarter of the blocks some order keeps everything."""
    kind = torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 4
    score = torch.nn.functional.one_hot(kind, 4).float().repeat_interleave(8, 1) * (1 + torch.rand(64, 32))
    assert kept_in_blocks([score], 16, 0.25) < 0.5 * float(score.sum())
    order = search_rows([score], 16, 0.25, 4, 0)
    assert kept_in_blocks([score[order]], 16, 0.25) == pytest.approx(float(score.sum()), rel=1e-5)


def test_choosing_blocks_and_groups_by_turns_goes_beyond_clusters() -> None:
    score = torch.rand(256, 96, generator=torch.Generator().manual_seed(3)) ** 4
    points = score / score.norm(dim=1, keepdim=True)
    order = clusters(points, 16, 8, torch.Generator().manual_seed(0)).argsort(stable=True)
    base, clustered = (kept_in_blocks([rows], 16, 0.3) for rows in (score, score[order]))
    found = kept_in_blocks([score[search_rows([score], 16, 0.3, 8, 0)]], 16, 0.3)
    assert base < clustered < 0.999 * found


@pytest.mark.parametrize("name", ["bert", "llama", "fused"])
def test_a_mask_of_blocks_keeps_more_and_the_model_computes_the_same(name: str) -> None:
    model, inputs = (Fused().eval(), (torch.randn(4, 8),)) if name == "fused" else getattr(zoo, name)()[:2]
    order, roles = PermuteChannels(structure="4x1", density=0.4), tuple(f"ffn:{role}" for role in ("up", "gate"))
    program, after, ctx = run(model, inputs, order)
    assert ctx.rewrites >= 1, [str(miss) for miss in ctx.misses]
    check_preserves(program, after, inputs, Preserves.VALUES)
    kept = []
    for passes in ((), (order,)):
        _, masked, _ = run(model, inputs, *passes, MaskWeights(structure="4x1", density=0.4, targets=roles))
        pairs = [(str(n.target), r.module) for r, n in masked.nodes() if n.op == "get_attr" and str(n.target).endswith("_mask")]
        kept.append(sum(float(get_tensor(m, t.removesuffix("_mask")).detach().abs()[get_tensor(m, t)].sum()) for t, m in pairs))
    assert kept[1] > 1.01 * kept[0]


def test_blocks_of_several_inputs_and_what_is_refused() -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 8),)
    program, after, ctx = run(Fused().eval(), x, PermuteChannels(structure="4x2", density=0.5))
    assert ctx.rewrites == 1
    check_preserves(program, after, x, Preserves.VALUES)
    _, _, ctx = run(Fused().eval(), x, PermuteChannels(structure="32x1", density=0.5))
    assert "do not divide into groups of 32" in str(ctx.misses[0])
    _, after, ctx = run(Fused().eval(), x, PermuteChannels(structure="4x3", density=0.5))
    assert "8 inputs do not divide into blocks of 3" in str(ctx.misses[0])
    with pytest.raises(BudgetError, match="no density"):
        run(Fused().eval(), x, PermuteChannels(structure="4x1"))
    assert run(Fused().eval(), x, PermuteChannels(structure="4x1"), density=0.5)[2].rewrites == 1
