"""A part of an FFN's hidden channels bypasses the activation, so that it can be merged into one linear after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.fold import erase_dead
from sparsify_compiler.normal_form_edit import Call, argument, aten, insert, is_call, rank
from sparsify_compiler.passes.reparam._probe import Moments, Probe, moments
from sparsify_compiler.passes_api import Context, Miss, Pass, Preserves
from sparsify_compiler.program import Program, Region, Site, get_tensor, set_tensor


@dataclass(frozen=True)
class IdleChannels(Pass):
    """Let a share of the hidden channels of each FFN bypass its activation; train on, then merge_idle_channels makes the FFN thin.

    Matches    linear(act(linear(x, w1, b1)), w2, b2)
    Rewrites   linear(cat([act(h[..., :k]), h[..., k:]], -1), w2, b2), h = linear(x, w1, b1), k = (1 - theta) * hidden
    Preserves  signature; quality is measured, and comes back by training
    Paper      Xu et al., RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization on Feedforward Network Layers,
               arXiv:2505.21847, section 3

    theta    share of idle channels; the paper's 0.75 leaves as many active ones as the FFN has inputs, where hidden is 4 times that
    which    "last" (the paper's) or "first"; or "straightest": those whose activation comes nearest to a straight line on the calibration
             data, weighted by what reads them. Their weights are rescaled to that line, so that an FFN that is already trained loses least.
             Written as where(mask, act(h), h), the mask a fixed buffer
    norm     "keep"; or "batch": a LayerNorm before the FFN becomes a BatchNorm over the channels of all tokens (the paper's change), with the
             mean and variance of the calibration data, fixed, and the LayerNorm's scale and shift. Then the merge takes in the shortcut too
    targets  selectors of FFN sites; all by default
    ignore   selectors of FFN sites that stay as they are
    """

    theta: float = 0.75
    which: Literal["last", "first", "straightest"] = "last"
    norm: Literal["keep", "batch"] = "keep"
    targets: tuple[str, ...] = ("ffn",)
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE

    def __post_init__(self) -> None:
        if not 0 < self.theta < 1:
            raise ParseError(f"theta lies between 0 and 1, got {self.theta}", where="idle_channels")
        for name, known in (("which", ("last", "first", "straightest")), ("norm", ("keep", "batch"))):
            if getattr(self, name) not in known:
                raise ParseError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}", where="idle_channels")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        ffns = []
        for site in self.ffns(program, ctx):
            ffn = _ffn(program.regions[site.region], site, self.theta, self.which == "straightest")
            if isinstance(ffn, Miss):
                ctx.miss(ffn.why, site.path)
            else:
                ffns.append(ffn)
        known = self._calibrated(program, ctx, ffns)
        for ffn in ffns:
            if not ctx.spend():
                break
            if self.norm == "batch":
                _batch_norm(ffn, known.get(f"{ffn.path}: input"), ctx)
            if self.which == "straightest":
                _bypass_straightest(ffn, *(known[f"{ffn.path}: {name}"] for name in ("hidden", "active", "sum")))
            else:
                _bypass(ffn, self.which == "first")
        return program

    def _calibrated(self, program: Program, ctx: Context, ffns: Sequence[_Ffn]) -> dict[str, Moments]:
        """What the options need to know of the values around each FFN."""
        probes: dict[str, Probe] = {}
        for ffn in ffns:
            w1, w2, h, act = (node.name for node in (ffn.up.kwargs["weight"], ffn.down.kwargs["weight"], ffn.up, ffn.chain[-1]))
            norm = _layer_norm(ffn.up)
            if self.norm == "batch" and norm is not None:
                probes[f"{ffn.path}: input"] = Probe(ffn.region.path, (norm.kwargs["input"].name,), w1)
            if self.which == "straightest":
                for name, values in (("hidden", (h,)), ("active", (act,)), ("sum", (h, act))):
                    probes[f"{ffn.path}: {name}"] = Probe(ffn.region.path, values, w2)
        return moments(program, ctx, probes) if probes else {}


@dataclass(frozen=True)
class _Ffn:
    """An FFN whose channels can be told apart: the linears, the calls between them, and how many channels are to be idle."""

    path: str
    region: Region
    up: Call
    chain: tuple[Call, ...]
    down: Call
    hidden: int
    idle: int


def _ffn(region: Region, site: Site, theta: float, rescale: bool) -> _Ffn | Miss:
    """The FFN at a site, or why it cannot have idle channels."""
    if site.facts["gated"]:
        return Miss("it is gated: a channel without activation is still a product of two projections, and does not merge")
    nodes = {role: region.node(name) for role, name in site.roles.items()}
    up, down = nodes["up"], nodes["down"]
    chain: list[fx.Node] = []
    node = down.kwargs["input"]
    while node is not up:
        if not isinstance(node, fx.Node) or node.kwargs.get("self") is None or len(node.all_input_nodes) != 1:
            return Miss("there is more than an elementwise activation between its linears")
        chain.insert(0, node)
        node = node.kwargs["self"]
    hidden = int(site.facts["hidden"])
    idle = round(theta * hidden)
    if not 0 < idle < hidden:
        return Miss(f"theta {theta} of {hidden} hidden channels leaves {hidden - idle} active and {idle} idle: there must be both")
    for weight in (up.kwargs["weight"], up.kwargs.get("bias")) if rescale else ():
        if isinstance(weight, fx.Node) and (weight.op != "get_attr" or set(weight.users) != {up}):
            return Miss(f"its weight {weight.name} is computed, or read elsewhere too: rescaling it would change more than this FFN")
    return _Ffn(site.path, region, up, tuple(chain), down, hidden, idle)  # type: ignore[arg-type]


def _add(before: fx.Node, target: object, **kwargs: object) -> fx.Node:
    node = insert(before, target, **kwargs)
    node.meta["by"] = "idle_channels"
    return node


def _bypass(ffn: _Ffn, first: bool) -> None:
    """Slices of the hidden channels, one through the activation."""
    cut, last = ffn.idle if first else ffn.hidden - ffn.idle, (rank(ffn.up) or 1) - 1
    start = ffn.chain[0]
    low = _add(start, aten.slice.Tensor, self=ffn.up, dim=last, end=cut)
    high = _add(start, aten.slice.Tensor, self=ffn.up, dim=last, start=cut)
    active, idle = (high, low) if first else (low, high)
    for call in ffn.chain:
        active = _add(call, call.target, **{**call.kwargs, "self": active})
    joined = _add(ffn.down, aten.cat.default, tensors=[idle, active] if first else [active, idle], dim=-1)
    ffn.down.kwargs = {**ffn.down.kwargs, "input": joined}
    erase_dead([ffn.chain[-1]])


def _bypass_straightest(ffn: _Ffn, hidden: Moments, active: Moments, both: Moments) -> None:
    """The activation is alpha * h + c + an error; idle are the channels whose error matters least, with rows of w1, b1 scaled to that line."""
    covariance = (both.square - hidden.square - active.square) / 2 - hidden.mean * active.mean
    alpha = torch.where(hidden.variance > 0, covariance / hidden.variance.clamp_min(1e-30), torch.zeros_like(covariance))
    shift = active.mean - alpha * hidden.mean
    error = (active.variance - alpha * covariance).clamp_min(0)
    w2 = _tensor(ffn, ffn.down.kwargs["weight"])
    read = w2.detach().double().square().sum(0)
    idle = torch.zeros(ffn.hidden, dtype=torch.bool)
    idle[torch.argsort(error.to(read.device) * read, stable=True)[: ffn.idle].cpu()] = True
    _rescale(ffn, torch.where(idle, alpha.cpu(), 1.0), torch.where(idle, shift.cpu(), 0.0))
    mask = _buffer(ffn, "active_channels", ~idle)
    chosen = _add(ffn.down, aten.where.self, condition=mask, self=ffn.chain[-1], other=ffn.up)
    ffn.down.kwargs = {**ffn.down.kwargs, "input": chosen}


def _tensor(ffn: _Ffn, node: fx.Node) -> Tensor:
    from sparsify_compiler.fold import evaluate

    return evaluate(ffn.region, node)


def _rescale(ffn: _Ffn, scale: Tensor, shift: Tensor) -> None:
    """Multiply the rows of w1 and b1, and add to b1, under their own names; the user's tensors stay as they are."""
    weight_node, bias_node = ffn.up.kwargs["weight"], ffn.up.kwargs.get("bias")
    weight = get_tensor(ffn.region.module, str(weight_node.target))
    with torch.no_grad():
        scale, shift = scale.to(weight.device), shift.to(weight.device)
        new = (weight.double() * scale[:, None]).to(weight.dtype)
        bias = None if bias_node is None else get_tensor(ffn.region.module, str(bias_node.target))
        moved = (shift if bias is None else bias.double() * scale + shift).to(weight.dtype)
    set_tensor(ffn.region.module, str(weight_node.target), nn.Parameter(new, requires_grad=weight.requires_grad))
    trained = nn.Parameter(moved, requires_grad=weight.requires_grad if bias is None else bias.requires_grad)
    if bias_node is not None:
        set_tensor(ffn.region.module, str(bias_node.target), trained)
    else:
        ffn.up.kwargs = {**ffn.up.kwargs, "bias": _attribute(ffn, str(weight_node.target) + "_shift", trained)}


def _buffer(ffn: _Ffn, name: str, value: Tensor) -> fx.Node:
    weight = str(ffn.up.kwargs["weight"].target)
    return _attribute(ffn, f"{weight.rpartition('.')[0]}.{name}".lstrip("."), value.to(get_tensor(ffn.region.module, weight).device))


def _attribute(ffn: _Ffn, name: str, value: Tensor) -> fx.Node:
    """A new parameter or buffer, read just before the FFN."""
    set_tensor(ffn.region.module, name, value)
    with ffn.region.graph.inserting_before(ffn.up):
        node = ffn.region.graph.get_attr(name)
    node.meta = {"by": "idle_channels", "path": ffn.up.meta.get("path", ""), "val": fake_like(value, mode_of(ffn.region))}
    return node


def _layer_norm(up: Call) -> Call | None:
    """The LayerNorm over channels that an FFN reads."""
    norm = up.kwargs["input"]
    return norm if is_call(norm, aten.layer_norm.default) and len(norm.kwargs["normalized_shape"]) == 1 else None


def _batch_norm(ffn: _Ffn, known: Moments | None, ctx: Context) -> None:
    """The FFN reads a BatchNorm of what the LayerNorm reads; others go on reading the LayerNorm."""
    norm = _layer_norm(ffn.up)
    if norm is None or known is None:
        ctx.miss("there is no LayerNorm over channels before it to replace", ffn.path)
        return
    x = norm.kwargs["input"]
    dtype, device = x.meta["val"].dtype, x.meta["val"].device
    path = str(norm.meta.get("path", "")).removeprefix(ffn.region.path).strip(".") or "norm"
    mean = _attribute(ffn, f"{path}.running_mean", known.mean.to(device, dtype))
    var = _attribute(ffn, f"{path}.running_var", known.variance.to(device, dtype))
    last = (rank(x) or 2) - 1
    turned = x if last == 1 else _add(ffn.up, aten.transpose.int, self=x, dim0=1, dim1=last)
    value = _add(ffn.up, aten.batch_norm.default, input=turned, weight=argument(norm, "weight"), bias=argument(norm, "bias"), running_mean=mean,
                 running_var=var, training=False, momentum=0.1, eps=argument(norm, "eps"), cudnn_enabled=True)
    value.meta |= {key: norm.meta[key] for key in ("path", "module") if key in norm.meta}
    ffn.up.kwargs = {**ffn.up.kwargs, "input": value if last == 1 else _add(ffn.up, aten.transpose.int, self=value, dim0=1, dim1=last)}
    erase_dead([norm])


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A plain FFN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).eval(), (torch.randn(2, 8, 16),)
