"""Let a row of a deep model skip the FFNs behind the one that hardly changed it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.givers import find_givers
from sparsify_compiler.ops import take_rows
from sparsify_compiler.passes.activation._guard import Guard, Stream
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.program import Program, Site, Stage, set_tensor
from sparsify_compiler.session import INPUT
from sparsify_compiler.sites import find_sites

KIND = ("ffn",)


@dataclass(frozen=True)
class SkipFfns(Pass):
    """Skip, in each row, the FFNs that stand behind one which left the residual stream's direction nearly as it was.

    Matches    x + linear(act(linear(norm(x), up)), down), and with a gate, in a stack of such blocks
    Rewrites   x + put_rows(ffn(take_rows(norm(x), open)), open); a row is open until cos(x, x + ffn(norm(x))) of an earlier block reaches the limit
    Preserves  signature; quality is measured
    Paper      FFN-SkipLLM, Jaiswal et al., arXiv:2404.03865

    density  FFNs computed / all FFNs, of the rows of calibration; by default the user's budget. The limit is found for it
    first    share of a stack's FFNs, from the first one on, that every row runs through
    last     the same, up to the last one
    warm     so many tokens at the beginning of each text skip nothing
    targets  selectors of FFN sites; all by default
    ignore   selectors of FFN sites that every row runs through

    Inside generate(), where a captured FFN does not see the stream, it is told what its norm reads (session.py). Needs calibration.
    """

    density: float | None = None
    first: float = 0.25
    last: float = 0.15
    warm: int = 16
    targets: tuple[str, ...] = KIND
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        if not (0 <= self.first <= 1 and 0 <= self.last <= 1) or self.warm < 0:
            raise ParseError(f"first and last lie between 0 and 1, warm at 0 or above; got {self.first}, {self.last}, {self.warm}", where="skip_ffns")
        self.take_selectors("targets", "ignore")
        self.check_density(self.density)

    def run(self, program: Program, ctx: Context) -> Program:
        density = self.density_of(ctx)
        stacks: dict[str, list[Site]] = {}
        for site in self.ffns(program, ctx):
            stacks.setdefault(_stack(site.path), []).append(site)
        streams = self._streams(program, stacks, ctx)
        for stack, sites in stacks.items():
            head, tail = math.ceil(self.first * len(sites)), len(sites) - math.ceil(self.last * len(sites))
            chain = [(site, streams[site.path]) for site in sites[head:tail] if site.path in streams]
            if any(_skips(program, site) for site in sites):
                ctx.miss("its rows skip FFNs already", stack)
            elif len(chain) < 2:
                ctx.miss(f"{len(chain)} of its {len(sites)} FFNs may be skipped, and the first of them decides about the others", stack)
            else:
                self._guard(program, stack, chain, sites, density, ctx)
        return program

    def _streams(self, program: Program, stacks: dict[str, list[Site]], ctx: Context) -> dict[str, Stream]:
        """Where each FFN's residual stream can be seen: in its own graph, or as what the module in front of it reads. A miss for the others."""
        residuals = find_sites(program, ("residual",))
        sites = [site for stack in stacks.values() for site in stack]
        found = {site.path: stream for site in sites if (stream := _inside(program, site, residuals)) is not None}
        missing = [site for site in sites if site.path not in found]
        givers: dict[str, str] = {}
        if missing and program.skeleton is not None:
            if not ctx.batches:
                raise CalibrationError("blocks are run to see how much they change, and there are no batches", where=missing[0].path,
                                       hint="give calibration=batches")
            givers = find_givers(program, ctx.batches[0])
        for site in missing:
            region = program.regions[site.region]
            source: Any = region.node(site.roles["up"]).kwargs["input"]
            if site.region in givers and source.op == "placeholder":
                found[site.path] = Stream(key=INPUT + givers[site.region])
            else:
                ctx.miss("the residual stream that it is added to is not seen", site.path)
        return found

    def _guard(self, program: Program, stack: str, chain: Sequence[tuple[Site, Stream]], sites: Sequence[Site], density: float,
               ctx: Context) -> None:
        """Rewrite one stack, and find the limit on what calibration sees."""
        if not ctx.batches:
            raise CalibrationError("a limit is found on batches, and there are none", where=stack, hint="give calibration=batches")
        if not ctx.spend():
            return
        guard = Guard(program, f"open rows of {stack}", self.warm, self.name())
        for number, (site, stream) in enumerate(chain):
            guard.add(site, stream, decides=number < len(chain) - 1)
        rows, _ = collect_rows(program, ctx.batches, guard.likeness)
        highest = torch.stack([rows[place][:, 0] for place in guard.likeness], 1).cummax(1).values  # what decides about the next FFN
        limit = _limit(highest, density * len(sites) - (len(sites) - highest.shape[1]))
        for region, name in guard.limits:
            set_tensor(program.regions[region].module, name, torch.tensor(limit, dtype=torch.float32))
        for site in sites:
            row = program.decisions.setdefault(site.path, _row(program, site))
            row.budget, row.reason = density, "every row runs through it"
        for (site, _), below in zip(chain[1:], (highest < limit).float().mean(0).tolist(), strict=True):
            row = program.decisions[site.path]
            row.density, row.reason = below, f"skipped behind an FFN that changes a row to a cosine of {limit:.4f} or more"


def _limit(highest: Tensor, wanted: float) -> float:
    """What is reached such that `wanted` of the columns lie below it in a row, on average; above every cosine where all shall.

    It lies halfway to the last that does not reach it: rounding would decide of one that is at the limit.
    """
    ordered = highest.flatten().sort().values
    count = max(round(wanted * highest.shape[0]), 0)
    if count >= ordered.numel():
        return 2.0
    before, reached = ordered[count - 1] if count else torch.full_like(ordered[0], -1.0), ordered[count]
    middle = (before + reached) / 2
    return float(torch.where(middle > before, middle, reached))     # between neighbouring floats there is none


def _stack(path: str) -> str:
    """The stack that a module is a member of: "model.layers" of "model.layers.3.mlp"."""
    found = re.match(r"(.*)\.\d+(?=\.|$)", path)
    return found[1] if found else ""


def _inside(program: Program, site: Site, residuals: Sequence[Site]) -> Stream | None:
    """The residual sum of the site's own graph whose branch ends at its down projection."""
    down = program.regions[site.region].node(site.roles["down"])
    for one in residuals:
        if one.region == site.region and one.roles["branch"] == down.name:
            return Stream(before=one.roles["input"], after=one.roles["add"])
    return None


def _skips(program: Program, site: Site) -> bool:
    source: Any = program.regions[site.region].node(site.roles["up"]).kwargs["input"]
    return source.target is take_rows.op


def _row(program: Program, site: Site) -> Decision:
    region = program.regions[site.region]
    shape = tuple(int(size) for size in region.node(site.roles["down"]).kwargs["weight"].meta["val"].shape)  # type: ignore[union-attr]
    return Decision(site.path, "ffn", shape, str(region.node(site.roles["down"]).meta["val"].dtype).removeprefix("torch."), "rows", format="rows")


class _Blocks(nn.Module):
    """A stack of x + FFN(norm(x))."""

    def __init__(self, width: int, count: int) -> None:
        from sparsify_compiler.passes.activation.select_neurons import GatedFfn

        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(count))
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": GatedFfn(width, 2 * width)}) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer["mlp"](norm(x))  # type: ignore[index]
        return x


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Five blocks over two texts of 20 tokens."""
    torch.manual_seed(0)
    return _Blocks(16, 5).eval(), (torch.randn(2, 20, 16),)
