"""Dependency groups: which dimensions of which parameters can only shrink together, on any captured graph.

The idea is that of DepGraph (Fang et al., arXiv:2301.12900): what is coupled through residual sums, norms, reshapes, attention and tied weights is
one group. There a graph of layers is walked, here dimensions are (axis.py): a fused projection, the heads of grouped queries or the features of
several layers that are put beside each other come out as what they are, runs and products of smaller dimensions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from .axis import Atom, Axis
from .axis_follow import Follow, follow, identity
from .normal_form_edit import aten, is_call
from .operands import CONVOLUTIONS
from .program import Program, Region, Site, get_tensor
from .site_graph import common_path

KINDS = ("heads", "neurons", "filters", "stream", "embedding", "head_dim", "copies")


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter that units of a group lie in.

    region, name  where the parameter is
    dim           which of its dimensions
    axis          what that is made of
    reads, writes  linears and convolutions that sum over this dimension of the weight, and those of which it is the output
    """

    region: Region
    name: str
    dim: int
    axis: Axis
    reads: tuple[fx.Node, ...] = ()
    writes: tuple[fx.Node, ...] = ()

    @property
    def tensor(self) -> Tensor:
        return get_tensor(self.region.module, self.name)


@dataclass(frozen=True)
class Group:
    """Units that can be taken out, each with all that depends on it.

    kind     "heads" of an attention (of grouped queries: a head of k and v with its queries; "copies" are the queries of every group), "neurons"
             between two linears, "filters" that a convolution makes, "stream": a residual stream, "embedding": what a table gives before anything is
             added to it; "head_dim": within every head
    path     module path, unique among all groups
    atom     the axis that its members share
    size     number of units
    members  in the order of execution; tied parameters once
    fixed    why nothing can be taken out; None where it can
    exact    True where a unit that no reader weighs changes nothing: there are readers, and no norm goes over the units
    """

    kind: str
    path: str
    atom: Atom
    size: int
    members: tuple[Member, ...]
    fixed: str | None
    exact: bool

    @property
    def site(self) -> Site:
        """As a site, for selectors."""
        return Site(self.kind, self.path, self.members[0].region.path if self.members else "", {})

    def weights(self) -> int:
        """Number of weights in all units."""
        return sum(member.tensor.numel() for member in self.members)


@dataclass(frozen=True)
class Groups:
    """The groups of a Program and what is known of its dimensions."""

    found: Follow
    groups: tuple[Group, ...]


def find_groups(program: Program) -> Groups:
    """Every group with a linear or convolution in it, in the order of execution; the fixed ones too."""
    found = follow(program)
    members: dict[Atom, dict[tuple[Hashable, int], Member]] = defaultdict(dict)
    for region, node in program.nodes():
        if node.op == "get_attr":
            key = identity(get_tensor(region.module, str(node.target)))
            for dim, axis in enumerate(found.values[node]):
                for leaf in dict.fromkeys(found.axes.leaves(axis or ())):
                    old = members[leaf].get((key, dim))
                    reads, writes = _users(node, dim)
                    members[leaf][key, dim] = Member(region, str(node.target), dim, axis, (*(old.reads if old else ()), *reads),
                                                     (*(old.writes if old else ()), *writes))
    marks, order = _marks(found), {node: i for i, (_, node) in enumerate(program.nodes())}
    groups, taken = [], set[str]()
    for atom, own in members.items():
        parts = tuple(own.values())
        if any(member.reads or member.writes for member in parts):
            kind = _kind(marks[atom], parts, order)
            path = _path(kind, parts, taken)
            taken.add(path)
            groups.append(Group(kind, path, atom, found.axes.sizes[atom], parts, found.axes.reasons.get(atom),
                                "normed" not in marks[atom] and any(member.reads for member in parts)))
    return Groups(found, tuple(groups))


def _users(node: fx.Node, dim: int) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """(ops that read the features at `dim` of this weight, ops that make them), through transposes and masks of the weight."""
    reads: list[fx.Node] = []
    writes: list[fx.Node] = []
    for user, at in _through(node, dim):
        if at < 2 and is_call(user, aten.linear.default, *CONVOLUTIONS):
            grouped = is_call(user, *CONVOLUTIONS) and user.kwargs.get("groups", 1) != 1
            (writes if at == 0 or grouped else reads).append(user)
        elif is_call(user, aten.embedding.default) and at == 1:
            writes.append(user)
    return tuple(reads), tuple(writes)


def _through(node: fx.Node, dim: int) -> Iterator[tuple[fx.Node, int]]:
    for user in node.users:
        if is_call(user, aten.t.default):
            yield from _through(user, 1 - dim)
        elif is_call(user, aten.mul.Tensor) and user.kwargs["self"] is node and user.meta["val"].shape == node.meta["val"].shape:
            yield from _through(user, dim)
        elif user.kwargs.get("weight") is node:
            yield user, dim


def _marks(found: Follow) -> dict[Atom, dict[str, None]]:
    """Leaf -> the roles that it was seen in."""
    marks: dict[Atom, dict[str, None]] = defaultdict(dict)
    for kind, axis, _, _ in found.marks:
        leaves = list(dict.fromkeys(found.axes.leaves(axis)))
        for i, leaf in enumerate(leaves):
            marks[leaf]["copies" if kind == "heads" and i > 0 and len(axis) == 1 and len(leaves) > 1 else kind] = None
    return marks


def _kind(marks: Mapping[str, None], members: Sequence[Member], order: Mapping[fx.Node, int]) -> str:
    for kind in ("head_dim", "heads", "copies"):
        if kind in marks:
            return kind
    made = [node for member in members for node in member.writes]
    read = [order[node] for member in members for node in member.reads]
    again = bool(made and read) and min(read) < max(map(order.__getitem__, made))  # what was read is written to once more
    if "sum" in marks and (again or "normed" in marks):
        return "stream"
    if any(is_call(node, aten.embedding.default) for node in made):
        return "embedding"
    return "filters" if any(is_call(node, *CONVOLUTIONS) for node in made) else "neurons"


def _path(kind: str, members: Iterable[Member], taken: set[str]) -> str:
    """The deepest module that all readers and writers lie in."""
    ops = [node for member in members for node in (*member.reads, *member.writes)]
    base = common_path(str(node.meta.get("path", "")) for node in ops) or kind
    path, number = base, 1
    while path in taken:
        path, number = f"{base}.{kind}" + (f"_{number}" if number > 1 else ""), number + 1
    return path
