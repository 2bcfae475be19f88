"""The search behind `lower(tune=True)`: every form of a layer against the others, in every cut that its family knows, and its variants by rows.

Forms take turns, and what loses early is dropped, so that most of the time goes to those that are close. Each layer's result is kept as soon as it is
known: a search that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.errors import KernelError
from sparsify_compiler.far import ELSEWHERE, require_here
from sparsify_compiler.measure import Timing, interleave
from sparsify_compiler.nearness import distance, near
from sparsify_compiler.passes.lower._far import weight_bytes
from sparsify_compiler.passes.lower._layer import EAGER, Form, bound
from sparsify_compiler.passes.lower._linear import Linear, Offered, eager, offered
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.work import BETWEEN, others

Forms = Mapping[str, Callable[[], object]]
LAPS = ((3, 1.5), (5, 1.15), (12, None))    # rounds, and how much slower than the best of its kind a form may be to stay
SECONDS = 1.5                               # of one lap, at the most
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)   # that variants are timed with, where the number of rows varies
GAIN = 0.97                                 # of the time of the variant that the family would choose: more than that is noise


def search(found: Iterable[tuple[Region, fx.Node]], program: Program, ctx: Context, again: bool) -> None:
    """Tune every layer of which nothing is known yet; with `again` every layer. Layers of one class are tuned once."""
    assert ctx.target is not None
    if ctx.board is None:
        require_here(ctx.target, ELSEWHERE)
    layers, taken, seen = list(found), set[fx.Node](), set[Any]()
    between = min(weight_bytes(program), BETWEEN)
    for done, (region, node) in enumerate(layers):
        ctx.progress("tune", done, len(layers))
        offer = offered(region, node, program, ctx, taken)
        if offer.key is not None and offer.key not in seen and (again or offer.record is None):
            seen.add(offer.key)
            if ctx.board is None:
                _tuned(offer, ctx, between)
            else:
                _tuned_there(offer, ctx, between)
    ctx.progress("tune", len(layers), len(layers))


def _tuned_there(offer: Offered, ctx: Context, between: int) -> None:
    """The same on a remote board: of every kernel that can be laid out for it the fastest variant for the example's rows, timed alone."""
    from sparsify_compiler.codegen import tuned

    assert ctx.target is not None
    layer, bias = offer.layer, offer.layer.bias
    x = offer.x.reshape(-1, offer.x.shape[-1]).contiguous()
    other = None if offer.other is None else offer.other.reshape(x.shape[0], -1).contiguous()
    times: dict[str, float] = {}
    options: dict[str, dict[str, Any]] = {}
    dense: set[str] = set()
    for epilogue, candidate in _with_space(offer, ctx):
        try:
            laid = candidate.lay(bias)
        except KernelError:
            continue
        added = other if laid.variants.adds else None
        found = ctx.board.times(laid, x, epilogue(eager(layer.weight, bias, x), added), added, between)
        if not found:
            ctx.miss(f"{candidate.name} computes something else on {ctx.board.name}", layer.decision.site)
            continue
        best = min(found, key=lambda variant: found[variant])
        name = candidate.name + epilogue.label
        times[name] = 1e3 * found[best]
        dense |= {name} if candidate.op == "linear" else set()
        options[candidate.name] = {**candidate.options, "variants": [[x.shape[0], best]]}
    tuned.store(tuned.Record(offer.key, times, tuple(sorted(dense)), options, f"measured on {ctx.target.name} by RPC, {_now()}"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="minutes")


def _tuned(offer: Offered, ctx: Context, between: int) -> None:
    """Race the forms of a layer, find the best variants of the winners, and keep both."""
    from sparsify_compiler.codegen import tuned

    assert ctx.kernels is not None
    layer = offer.layer
    layer.add(EAGER, partial(eager, layer.weight, layer.bias), offer.x, offer.other, Form())
    for epilogue, candidate in _with_space(offer, ctx):
        try:
            kernel = bound(candidate, layer.bias, ctx)
        except KernelError:  # another cut of a kernel that does not fit this weight
            continue
        layer.add(candidate.name + epilogue.label, kernel, offer.x, offer.other, Form(candidate.op == "linear", kernel, epilogue))
    dense = {name for name, form in layer.forms.items() if form.dense}
    times = {name: timing.median for name, timing in race(layer.runs, dense, others(between, offer.x)).items()}
    options, usual = {}, {candidate.name for _, candidate in offer.found}
    for kind in (dense, set(times) - dense):
        best = min(kind, key=lambda name: times[name], default=EAGER)
        kernel, name = layer.forms[best].kernel, best.removesuffix(layer.forms[best].epilogue.label)
        variants = _variants(layer, kernel, offer)
        if variants or (kernel is not None and name not in usual):
            options[name] = {**kernel.options, **variants}
    tuned.store(tuned.Record(offer.key, times, tuple(sorted(dense)), options, f"measured {_now()}"))


def _with_space(offer: Offered, ctx: Context) -> list[tuple[Any, Any]]:
    """The candidates, and the same in other cuts."""
    assert ctx.kernels is not None
    made = list(offer.found)
    for epilogue in dict.fromkeys(epilogue for epilogue, _ in offer.found):
        own = [one for label, one in offer.found if label == epilogue]
        made += [(epilogue, one) for one in ctx.kernels.space(own)]
    return made


def race(forms: Forms, dense: set[str], before: Callable[[Callable[[], object]], object] | None = None) -> dict[str, Timing]:
    """The time of every form, in turns. What is much slower than the best of its kind, dense or not, takes no part in later laps."""
    times: dict[str, Timing] = {}
    left = dict(forms)
    for rounds, slower in LAPS:
        times |= interleave(left, rounds=rounds, warmup=0 if times else 1, at_most=SECONDS, repeats=1, before=before)
        if slower is None:
            break
        best = {kind: min((times[name].median for name in left if (name in dense) == kind), default=0.0) for kind in (True, False)}
        left = {name: form for name, form in left.items() if name == EAGER or times[name].median <= slower * best[name in dense]}
    return times


def _variants(layer: Linear, kernel: Any, offer: Offered) -> dict[str, Any]:
    """Which variant of a kernel is the fastest, by rows; nothing where there is but one, or none that is chosen by rows."""
    laid = getattr(kernel, "laid", None)
    if laid is None or not hasattr(kernel, "by") or len(laid.variants.schedules) < 2:
        return {}
    x = offer.x.reshape(-1, offer.x.shape[-1])
    varies = any(not isinstance(size, int) for size in layer.node.meta["val"].shape)
    rows = sorted({layer.rows, *([count for count in ROWS if count <= max(2 * layer.rows, 16)] if varies else [])})
    return {"variants": [[count, _fastest(kernel, laid, x[:1].expand(count, -1).contiguous() if count > len(x) else x[:count], laid.variants.adds)]
                         for count in rows if count]}


def _fastest(kernel: Any, laid: Any, x: Tensor, adds: bool) -> str:
    """The variant that the family chooses for these rows, or one that was measured to be clearly faster and computes the same."""
    usual = laid.variants.choose(x.shape[0])
    other = torch.ones(x.shape[0], kernel.out_features, dtype=x.dtype) if adds else None
    expected = kernel.by(usual, x, other)
    runs = {name: partial(kernel.by, name, x, other) for name in laid.variants.schedules
            if distance(kernel.by(name, x, other), expected) <= near(x.dtype)}
    times = {name: timing.median for name, timing in race(runs, set()).items()}
    best = min(times, key=lambda name: times[name], default=usual)
    return best if times and times[best] < GAIN * times[usual] else usual


