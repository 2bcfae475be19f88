"""A layer made up for a Work: random weights of its structure in every form that runs on this machine, and an x to call them with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import catalog, work_sample_kernels
from .errors import InputError
from .ops import select_ffn
from .target import Target

if TYPE_CHECKING:
    from .work import Work

EAGER, HELD = "dense eager", "held neurons"
ACTIVATION = "silu"
WIDTH = 64              # of the rows of an elementwise op
OF_GELU = 20            # operations for each element, about
LINEARS = {"gate": ("hidden", "K"), "up": ("hidden", "K"), "down": ("N", "hidden")}     # of a gated FFN: outputs and inputs
Form = Callable[[], object]
Tensors = dict[str, Tensor]


def forms_of(work: Work, target: Target) -> tuple[dict[str, Form], Tensor]:
    """Every form of the layer, the dense ones first, and the x that all of them read.

    Raises InputError for an op that is not made up here, or lacks a size.
    """
    makers: Mapping[str, work_sample_kernels.Maker] = {
        "elementwise": _elementwise, "attend": _attend, "select_linear": _select_linear, "select_ffn": _select_ffn,
        "select_inputs_ffn": _select_inputs_ffn, "predicted_ffn": _predicted_ffn, "held_ffn": _held_ffn}
    maker = _linear if work.op.partition("_")[0] == "linear" else makers.get(work.op) or work_sample_kernels.maker_of(work.op)
    if maker is None:
        raise InputError(f"{work.op} cannot be made up from its sizes", where="work",
                         hint="linear layers, convolutions, gated FFNs, experts, attention and elementwise ops can")
    generator = torch.Generator().manual_seed(0)
    try:
        return maker(work, target, lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float32))
    except KeyError as error:
        raise InputError(f"the size {error} of {work.op} is missing", where="work", hint="cost_models/symbols.py says what each size is") from error


Noise = Callable[..., Tensor]


def _linear(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    rows, outputs, inputs = (int(sizes[name]) for name in "MNK")
    weight, bias, x = noise(outputs, inputs).to(dtype), noise(outputs).to(dtype), noise(rows, inputs).to(dtype)
    forms: dict[str, Form] = {EAGER: partial(linear, x, weight, bias)}
    sources: list[tuple[str, Tensors, Mapping[str, Any]]] = [("linear", {"weight": weight}, {})]
    if work.op != "linear":
        form = catalog.get("format", work.op.removeprefix("linear_"))
        attributes = {name: int(sizes[name]) for name in ("r", "c", "n", "m") if name in sizes}
        stored = form.encode(weight, random_mask(work, outputs, inputs), **attributes)
        sources.append((work.op, stored.tensors(), stored.attributes()))
    for op, tensors, about in sources:
        forms |= _bound(op, tensors, about, x, bias, target)
    return forms, x


def _elementwise(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    """An addition of two tensors, a cast, a norm or a GELU, by how much is read and how many operations there are for each element."""
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    written, taps = int(sizes["written"]), sizes["taps"]
    x = noise(written // WIDTH, WIDTH).to(dtype)
    if sizes["read"] > written:
        return {EAGER: partial(torch.add, x, x.clone())}, x
    if taps <= 1:
        return {EAGER: partial(x.to, torch.bfloat16 if dtype == torch.float32 else torch.float32)}, x
    if taps < OF_GELU:
        return {EAGER: partial(torch.nn.functional.layer_norm, x, (WIDTH,), torch.ones(WIDTH, dtype=dtype), torch.zeros(WIDTH, dtype=dtype))}, x
    return {EAGER: partial(torch.nn.functional.gelu, x)}, x


def _attend(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    """Every query with as many keys, over as many heads as there are rows for."""
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    keys = int(sizes["pairs"] / sizes["M"])
    x, key = (noise(1, int(sizes["M"]) // keys, keys, int(sizes["K"])).to(dtype) for _ in range(2))
    value = noise(1, x.shape[1], keys, int(sizes["E"])).to(dtype)
    return {EAGER: partial(torch.nn.functional.scaled_dot_product_attention, x, key, value)}, x


def random_mask(work: Work, outputs: int, inputs: int) -> Tensor:
    """bool [N, K]: what a weight of this op's format and density keeps, anywhere."""
    sizes, generator = dict(work.sizes), torch.Generator().manual_seed(1)

    def top(rows: int, columns: int, count: int) -> Tensor:
        scores = torch.rand(rows, columns, generator=generator, dtype=torch.float32)
        return torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, scores.topk(min(count, columns), 1).indices, True)

    form = work.op.partition("_")[2]
    if form == "nm":
        n, m = int(sizes["n"]), int(sizes["m"])
        return top(outputs * inputs // m, m, n).view(outputs, inputs)
    density = sizes["density"]
    if form == "condensed":
        return top(outputs, inputs, round(density * inputs))
    r, c = int(sizes.get("r", 1)), int(sizes.get("c", 1))
    blocks = torch.rand(-(-outputs // r), inputs // c, generator=generator, dtype=torch.float32) < density
    return blocks.repeat_interleave(r, 0)[:outputs].repeat_interleave(c, 1)


def _select_linear(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    rows, outputs, inputs = (int(sizes[name]) for name in "MNK")
    weight, bias, x = noise(inputs, outputs).to(dtype), noise(outputs).to(dtype), noise(rows, inputs).to(dtype)
    forms: dict[str, Form] = {EAGER: partial(linear, x, weight.t().contiguous(), bias)}
    forms |= _bound("linear", {"weight": weight.t().contiguous()}, {"any_rows": True}, x, bias, target)
    return forms | _bound("select_linear", {"weight": weight, "limit": limit_of(x, sizes["density"])}, {}, x, bias, target), x


def _select_ffn(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    weights, x, forms = _ffn(work, target, noise)
    gates = select_ffn.hidden(ACTIVATION, linear(x, weights["gate"]))
    tensors = {**weights, "down": weights["down"].t().contiguous(), "limit": limit_of(gates, dict(work.sizes)["density"])}
    return forms | _bound("select_ffn", tensors, {"activation": ACTIVATION}, x, None, target), x


def _select_inputs_ffn(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    weights, x, forms = _ffn(work, target, noise)
    density = dict(work.sizes)["density"]
    hidden = select_ffn.hidden(ACTIVATION, *(linear(x, weights[name]) for name in ("gate", "up")))
    tensors = {name: weight.t().contiguous() for name, weight in weights.items()}
    tensors |= {f"{name}_limit": limit_of(hidden if name == "down" else x, density) for name in weights}
    return forms | _bound("select_inputs_ffn", tensors, {"activation": ACTIVATION}, x, None, target), x


def _predicted_ffn(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    weights, x, forms = _ffn(work, target, noise)
    scores, density = noise(x.shape[0], weights["gate"].shape[0]).abs(), dict(work.sizes)["density"]
    tensors = {**weights, "down": weights["down"].t().contiguous(), "limit": limit_of(scores, density)}
    found = _candidates(work.op, tensors, {"activation": ACTIVATION}, x, target)
    return forms | {candidate.name: _Bound(candidate, None, x, scores) for candidate in found}, x


def _held_ffn(work: Work, target: Target, noise: Noise) -> tuple[dict[str, Form], Tensor]:
    """Behind the prompt, from where on some neurons are held."""
    weights, x, forms = _ffn(work, target, noise)
    held = math.ceil(dict(work.sizes)["density"] * weights["gate"].shape[0])
    cut = {name: partial(_times, weight[:, :held].contiguous() if name == "down" else weight[:held]) for name, weight in weights.items()}
    return forms | {HELD: partial(_whole, x, cut)}, x


def _ffn(work: Work, target: Target, noise: Noise) -> tuple[Tensors, Tensor, dict[str, Form]]:
    """Weights [out, in], x, and the dense forms of a gated FFN."""
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    weights = {name: (noise(*(int(sizes[size]) for size in shape)) * sizes[shape[1]] ** -0.5).to(dtype) for name, shape in LINEARS.items()}
    x = noise(int(sizes["M"]), int(sizes["K"])).to(dtype)

    whole = partial(_whole, x)
    forms: dict[str, Form] = {EAGER: partial(whole, {name: partial(_times, weight) for name, weight in weights.items()})}
    candidates = {name: _candidates("linear", {"weight": weight}, {"any_rows": True}, x, target) for name, weight in weights.items()}
    for number, candidate in enumerate(candidates["gate"]):
        if all(number < len(found) for found in candidates.values()):
            forms[candidate.name] = _Whole(whole, {name: found[number] for name, found in candidates.items()})
    return weights, x, forms


def _whole(x: Tensor, linears: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
    return linears["down"](select_ffn.hidden(ACTIVATION, linears["gate"](x), linears["up"](x)))


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def limit_of(x: Tensor, density: float) -> Tensor:
    """The limit, float32 [], that this share of the magnitudes of x reaches."""
    size = x.abs().float().flatten()
    skipped = min(round((1 - density) * size.numel()), size.numel() - 1)
    return size.kthvalue(skipped + 1).values


def _candidates(op: str, tensors: Tensors, attributes: Mapping[str, Any], x: Tensor, target: Target) -> list[Any]:
    from .codegen import runtime

    return runtime.candidates(op, tensors, attributes, x.dtype, (x.shape[0],), target)


def _bound(op: str, tensors: Tensors, attributes: Mapping[str, Any], x: Tensor, bias: Tensor | None, target: Target) -> dict[str, Form]:
    """Every kernel of an op, which is bound to its weight when it is called first."""
    return {candidate.name: _Bound(candidate, bias, x) for candidate in _candidates(op, tensors, attributes, x, target)}


class _Whole:
    """An FFN and the kernels of its linears."""

    def __init__(self, function: Callable[..., Tensor], candidates: Mapping[str, Any]) -> None:
        self._function, self._candidates = function, candidates

    @cached_property
    def _kernels(self) -> dict[str, Any]:
        return {name: candidate.bind(None) for name, candidate in self._candidates.items()}

    def __call__(self) -> object:
        return self._function(self._kernels)


class _Bound:
    """A kernel and what it is called with."""

    def __init__(self, candidate: Any, bias: Tensor | None, *given: Tensor) -> None:
        self._candidate, self._bias, self._given = candidate, bias, given

    @cached_property
    def _kernel(self) -> Any:
        return self._candidate.bind(self._bias)

    def __call__(self) -> object:
        return self._kernel(*self._given)
