"""Rotate the residual stream of a transformer with RMSNorms so that its features are sorted by how much they matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.fold import evaluate, is_constant
from sparsify_compiler.normal_form_edit import argument, aten, insert, is_call
from sparsify_compiler.passes.prune._layers import chosen_ops
from sparsify_compiler.passes.reparam._bases import Bases, Rotation, plan_bases
from sparsify_compiler.passes.reparam._stream import stream_of
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.program import Program, set_tensor
from sparsify_compiler.sweep import Sweep


@dataclass(frozen=True)
class RotateStream(Pass):
    """Give each part of the residual stream the principal components of what its norms give, or of the weights that read it, as its basis.

    The most important one comes first.

    A norm without scale commutes with an orthogonal Q. After this the last features can be cut: remove_channels(score="leading",
    targets=("stream",)). Run layernorm_to_rmsnorm and fold_norm_affine before.

    share  how many values in turn that a norm reads have one basis. With 1 (the paper's) every residual connection needs a matrix from one basis to
           the next; with 0 there is one basis, and none
    density  share of the features that will be kept, by default the user's budget: the components of each part are then those of the stream that
           is left when the parts before it were cut (the paper's order; with share=1, and a model that was captured whole). Otherwise of what
           the norms of the dense model give: where parts share a basis, the stream's growth with depth would let the last ones decide it
    untie  rotate an embedding or weight that others read too, by giving the stream a copy of its own; else what it writes keeps its basis
    basis  "activations": of what the norms give, which needs calibration; "weights": of the rows of the linears that read them, whose columns are
           orthogonal then: what an input adds to the outputs is at right angles to what any other adds (WINA, arXiv:2505.19427, section 3.2)
    readers  selectors of those linears, for "weights"; a norm that none of them reads is looked at through all of its linears

    Matches    rms_norm(h), h a sum of linear(x, w, b), embedding(i, e) and parameters p that nothing but rms_norms and sums reads
    Rewrites   in basis Q: linear(x, Q' w, b Q), embedding(i, e Q), p Q; linear(h, Q2' Q1) from one basis to the next; w Q for each linear that
               reads the norm, or linear(rms_norm(h), diag(g) Q) before those of another kind
    Preserves  values, up to float reassociation
    Paper      Ashkboos et al., SliceGPT, arXiv:2401.15024, sections 3.1 and 3.3
    """

    share: int = 1
    density: float | None = None
    untie: bool = False
    basis: Literal["activations", "weights"] = "activations"
    readers: tuple[str, ...] = ("linear",)

    idempotent: ClassVar[bool] = False  # the principal components are found anew

    def __post_init__(self) -> None:
        self.check_density(self.density)
        self.take_selectors("readers")
        if self.basis not in ("activations", "weights"):
            raise ParseError(f"basis is 'activations' or 'weights', not {self.basis!r}", where="rotate_stream")
        if self.share < 0:
            raise ParseError(f"share is a number of norms, or 0 for all, not {self.share}", where="rotate_stream")

    def own_density(self) -> float | None:
        """None: the option says what a pass behind this one will keep, and this one keeps all."""
        return None

    def run(self, program: Program, ctx: Context) -> Program:
        plans: list[Bases] = []
        for region in program.regions.values():
            norms = [node for node in region.graph.nodes if is_call(node, aten.rms_norm.default)]
            done: set[fx.Node] = set()
            for norm in norms:
                if norm in done or len(norm.kwargs["normalized_shape"]) != 1:
                    continue
                stream = stream_of(norm)
                done.update([norm, *stream.norms])
                plan = stream.miss or plan_bases(region, stream, self.share, self.untie)
                if isinstance(plan, Miss):
                    ctx.miss(plan.why, region.qualified(plan.at or norm.name))
                else:
                    plans.append(plan)
            if not norms:
                ctx.miss("there is no rms_norm in the graph: layernorm_to_rmsnorm makes them", region.path)
        plans = [plan for plan in plans if ctx.spend()]
        density = self.density if self.density is not None else ctx.density
        ordered = self.share == 1 and density is not None and ctx.batches is not None and program.skeleton is None
        if self.basis == "weights":
            found = _of_weights(plans, chosen_ops(program, self.readers) if plans else set())
        else:
            found = _in_order(program, plans, density or 1.0, ctx) if ordered else _principal(program, plans, ctx)
        for plan, bases in zip(plans, found, strict=True):
            Rotation(plan, bases, self.name()).run()
        return program


def _in_order(program: Program, plans: list[Bases], density: float, ctx: Context) -> list[dict[int, Tensor]]:
    """For each plan, basis -> eigenvectors [features, features] of X' X, largest eigenvalue first, X the rows that reach the basis's norm.

    They have lost the last features of all parts before it, and are not normalised: tokens of very large norm, on which attention rests, must stay.
    """
    sweep = Sweep(program, ctx.batches or ())
    result: list[dict[int, Tensor]] = [{} for _ in plans]
    stops = {norm.kwargs["input"]: (number, basis) for number, plan in enumerate(plans) for basis, norms in plan.norms.items() for norm in norms}
    for done, node in enumerate(sorted(stops, key=sweep.order), 1):  # type: ignore[arg-type]
        assert isinstance(node, fx.Node)
        number, basis = stops[node]
        values = sweep.reach(node)
        gram = torch.stack([rows.T @ rows for value in values for rows in [value.reshape(-1, value.shape[-1]).double()]]).sum(0)
        result[number][basis] = q = _sorted_basis(gram)
        kept = q[:, : max(1, round(density * q.shape[1]))].to(values[0])
        sweep.substitute(node, [value @ kept @ kept.T for value in values])
        ctx.progress("rotate stream", done, len(stops))
    return result


def _of_weights(plans: list[Bases], chosen: set[tuple[str, str]]) -> list[dict[int, Tensor]]:
    """For each plan, basis -> the eigenvectors [features, features] of W' W, largest eigenvalue first; W are the rows of what reads the norms."""
    result = []
    for plan in plans:
        bases = {}
        for basis, norms in plan.norms.items():
            readers = [user for norm in norms for user in norm.users if is_call(user, aten.linear.default) and user.kwargs["input"] is norm]
            readers = [user for user in readers if is_constant(user.kwargs["weight"])]
            wanted = [user for user in readers if (plan.region.path, user.name) in chosen] or readers
            gram = torch.zeros(2 * (int(norms[0].meta["val"].shape[-1]),), dtype=torch.float64)
            for user in wanted:
                weight = _scaled(plan, user)
                gram += weight.T @ weight
            bases[basis] = _sorted_basis(gram)
        result.append(bases)
    return result


def _scaled(plan: Bases, reader: Any) -> Tensor:
    """The weight of a linear, times the scale of the norm that it reads, float64."""
    weight, scale = evaluate(plan.region, reader.kwargs["weight"]).double(), reader.kwargs["input"].kwargs.get("weight")
    return weight if scale is None else weight * evaluate(plan.region, scale).double()


def _sorted_basis(gram: Tensor) -> Tensor:
    """Eigenvectors, largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return vectors


def _principal(program: Program, plans: list[Bases], ctx: Context) -> list[dict[int, Tensor]]:
    """For each plan, basis -> the eigenvectors [features, features] of X' X, largest eigenvalue first; X is what the norms give, without scale."""
    if not plans:
        return []
    if ctx.calibrate is None:
        raise CalibrationError("principal components need calibration, and there is none", where="rotate_stream", hint="give calibration=batches")
    watched = program.clone()
    for number, plan in enumerate(plans):
        for norms in plan.norms.values():
            for norm in norms:
                _probe(watched, plan, norm, _name(number, norm))
    names = [_name(number, norm) for number, plan in enumerate(plans) for norms in plan.norms.values() for norm in norms]
    found = ctx.calibrate(watched, dict.fromkeys(names, frozenset({"gram"})))
    result = []
    for number, plan in enumerate(plans):
        bases = {}
        for basis, norms in plan.norms.items():
            gram = torch.stack([found.get(_name(number, norm), "gram").double() for norm in norms]).sum(0)
            bases[basis] = _sorted_basis(gram)
        result.append(bases)
    return result


def _name(number: int, norm: fx.Node) -> str:
    return f"rotate_stream.{number}.{norm.name}"


def _probe(watched: Program, plan: Bases, norm: fx.Node, name: str) -> None:
    """A linear that nobody reads, so that calibration looks at what it would read: the norm without its scale."""
    region = watched.regions[plan.region.path]
    here = region.node(norm.name)
    output = next(node for node in reversed(region.graph.nodes) if node.op == "output")
    value = here.meta["val"]
    plain = insert(output, aten.rms_norm.default, value, input=here.kwargs["input"], normalized_shape=here.kwargs["normalized_shape"],
                   eps=argument(here, "eps"))
    stored = f"probe_{len(region.graph.nodes)}"
    set_tensor(region.module, stored, torch.zeros(1, int(value.shape[-1]), dtype=value.dtype))
    with region.graph.inserting_before(output):
        weight = region.graph.get_attr(stored)
    weight.meta["val"] = value.new_empty(1, int(value.shape[-1]))
    reader = insert(output, aten.linear.default, input=plain, weight=weight)
    reader.meta |= {"path": name, "module": ""}


class _Transformer(nn.Module):
    """A pre-norm language model of two FFNs, with RMSNorms and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.last = nn.Embedding(11, 8), nn.RMSNorm(8)
        self.norms = nn.ModuleList([nn.RMSNorm(8, elementwise_affine=False) for _ in range(3)])
        self.ups, self.downs = (nn.ModuleList([nn.Linear(*size) for _ in range(3)]) for size in ((8, 12), (12, 8)))
        nn.init.uniform_(self.last.weight, 0.5, 1.5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            h = h + down(nn.functional.gelu(up(norm(h))))
        return nn.functional.linear(self.last(h), self.tokens.weight)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A language model of three blocks, without attention."""
    torch.manual_seed(0)
    return _Transformer().eval(), (torch.randint(0, 11, (4, 5)),)
