"""Layers for benchmarks/gpu.py: each with its reference, its rivals, and what it has to read. Every one is made of random weights on a device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify_compiler.codegen import attend as calls
from sparsify_compiler.codegen.cuda import attend, experts, ffn, gather, linear
from sparsify_compiler.formats.bsr import Bsr
from sparsify_compiler.formats.csr import Csr
from sparsify_compiler.formats.nm import Nm
from sparsify_compiler.ops import attend_blocks, experts_ffn, select_ffn, select_linear
from sparsify_compiler.target import resolve

ANY = resolve("sm_80")
SMALL_BLOCKS = ((16, 1), (32, 4), (64, 1), (64, 64), (128, 1), (128, 8))
FEW = 16            # rows that a layer's weights take turns for: more of them leave little in the cache
BF16 = torch.bfloat16
COLD, MOST = 1 << 28, 6 << 30   # bytes that are read before any is read again, so that none of them is in the cache; bytes of copies that see to it


@dataclass
class Case:
    """ours() -> y; wanted() -> the same in float32; rivals by name; bytes that ours must read, multiplications that it does; copies that take
    turns; rivals that wait for the device, which no graph can."""

    name: str
    ours: Callable[[], Tensor]
    wanted: Callable[[], Tensor]
    rivals: dict[str, Callable[[], Any]] = field(default_factory=dict)
    bytes: float = 0.0
    products: float = 0.0
    turns: int = 1
    waits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Make:
    """Makes a case on a device."""

    case: Callable[..., Case]
    given: dict[str, Any]

    def __call__(self, device: torch.device) -> Case:
        return self.case(device, **self.given)

    def label(self) -> str:
        """What is to be made."""
        return f"{self.case.__name__} {' '.join(map(str, self.given.values()))}"

    def shrunk(self) -> Make:
        """The same with less of what no kernel depends on: one that launches the same kernels in no time."""
        less = {name: min(size, self.given[name]) for name, size in LESS[self.case.__name__].items()}
        return Make(self.case, {**self.given, **less})


LESS = {"gather_case": {"inputs": 256}, "ffn_case": {"hidden": 256}, "sparse_case": {"outputs": 128}, "attend_case": {"queries": 256, "keys": 512},
        "experts_case": {"inputs": 64, "hidden": 64}}  # fmt: skip


def of(case: Callable[..., Case], *given: Any, **named: Any) -> Make:
    """A case to be made, by its arguments."""
    names = list(inspect.signature(case).parameters)[1:]
    return Make(case, {**dict(zip(names, given, strict=False)), **named})


def numbers(device: torch.device, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(shape, dtype=torch.float32, device=device) * scale).to(dtype)


def bound(family: Any, op: str, tensors: dict[str, Tensor], attributes: dict[str, Any], dtype: torch.dtype = BF16, rows: int = 1) -> Any:
    (_, options), = family.offer(op, tensors, attributes, dtype, (rows,), ANY)
    return family.bind(op, options, tensors, attributes, None, {}, ANY, [])


def many(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


def copies(device: torch.device, read: float, held: float) -> int:
    """Of what a call reads so much of, in bytes."""
    return max(1, min(math.ceil(COLD / max(read, 1)), int(MOST // max(held, 1)))) if device.type == "cuda" else 1


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The next of them, each time."""
    state = [0]

    def run() -> Any:
        state[0] = (state[0] + 1) % len(calls)
        return calls[state[0]]()

    return run


def gather_case(device: torch.device, inputs: int, outputs: int, density: float, rows: int = 1, dtype: torch.dtype = BF16,
                scaled: bool = False) -> Case:
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - density, dtype=torch.float64)))
    x, limit = numbers(device, rows, inputs, dtype=dtype), torch.tensor(quantile, dtype=torch.float32, device=device)
    extra = {"scale": torch.ones(inputs, dtype=torch.float32, device=device)} if scaled else {}
    size = inputs * outputs * dtype.itemsize
    weights = [numbers(device, inputs, outputs, scale=0.02, dtype=dtype) for _ in range(copies(device, size * density, 2 * size))]
    layers = [bound(gather, "select_linear", {"weight": weight, "limit": limit, **extra}, {}, dtype) for weight in weights]
    dense = [weight.t().contiguous() for weight in weights]
    kept = float((x.abs() >= limit).any(0).sum())
    return Case(f"gather {inputs}x{outputs} at {density:.0%}, {many(rows)} {str(dtype)[6:]}", in_turn([partial(layer, x) for layer in layers]),
                lambda: select_linear.reference(x.float(), limit, weights[1 % len(weights)].float(), extra.get("scale")),
                {"cuBLAS dense": in_turn([partial(F.linear, x, weight) for weight in dense]),
                 "a sum of as many bytes": in_turn([partial(torch.sum, part_of(weight, kept)) for weight in weights])},
                kept * outputs * dtype.itemsize, rows * kept * outputs, len(weights))


def part_of(weight: Tensor, rows: float) -> Tensor:
    """The first rows of a matrix as float32: as many bytes, that a kernel of torch adds up as fast as it can read them."""
    part = weight[: max(2, int(rows)) // 2 * 2].reshape(-1)
    return part if part.dtype is torch.float32 else part.view(torch.float32)


def ffn_case(device: torch.device, inputs: int, hidden: int, limit: float) -> Case:
    x, tight = numbers(device, 1, inputs), torch.tensor(limit, dtype=torch.float32, device=device)
    sets = [[numbers(device, hidden, inputs, scale=0.03) for _ in range(3)]
            for _ in range(copies(device, 2 * hidden * inputs, 8 * hidden * inputs))]
    layers = [bound(ffn, "select_ffn", {"gate": g, "up": u, "down": d, "limit": tight}, {"activation": "silu"}) for g, u, d in sets]
    turned = [d.t().contiguous() for _, _, d in sets]
    share = float((F.silu(x.float() @ sets[0][0].float().t()).abs() >= tight).float().mean())
    dense = [lambda g=g, u=u, t=t: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), t) for (g, u, _), t in zip(sets, turned, strict=True)]
    first = sets[1 % len(sets)]
    return Case(f"selected neurons {inputs}x{hidden} at {share:.0%}", in_turn([partial(layer, x) for layer in layers]),
                lambda: select_ffn.reference(x.float(), tight, *(w.float() for w in first), activation="silu"), {"cuBLAS dense": in_turn(dense)},
                (1 + 2 * share) * hidden * inputs * 2, (1 + 2 * share) * hidden * inputs, len(sets))


def sparse_case(device: torch.device, kind: str, outputs: int, inputs: int, rows: int, density: float = 0.5, r: int = 1, c: int = 1,
                dtype: torch.dtype = BF16) -> Case:
    """kind: "2:4", "blocks" of r x c, or "rows" of no structure."""
    weight, x = numbers(device, outputs, inputs, scale=0.02, dtype=dtype), numbers(device, rows, inputs, dtype=dtype)
    mask = _mask(kind, outputs, inputs, density, r, c, device)
    weight = weight * mask
    stored: Any = {"2:4": lambda: Nm.encode(weight, mask, n=2, m=4), "blocks": lambda: Bsr.encode(weight, mask, r=r, c=c),
                   "rows": lambda: Csr.encode(weight, mask)}[kind]()
    kept = float(mask.sum())
    index = {"2:4": 0.25, "blocks": 4 / r, "rows": 2.0}[kind]
    read = kept * (dtype.itemsize + index)
    turns = copies(device, read, 4 * weight.nbytes) if rows <= FEW else 1
    again = [{name: tensor.clone() for name, tensor in stored.tensors().items()} for _ in range(turns)]
    layers = [bound(linear, f"linear_{stored.name()}", tensors, stored.attributes(), dtype, rows) for tensors in again]
    dense = [weight.clone() for _ in range(turns)]
    label = f"{r}x{c} blocks at {density:.0%}" if kind == "blocks" else kind if kind == "2:4" else f"no structure at {density:.0%}"
    rivals: dict[str, Callable[[], Any]] = {"cuBLAS dense": in_turn([partial(F.linear, x, each) for each in dense])}
    if kind == "2:4" and rows > FEW and not outputs % 32 + inputs % 64 and device.type == "cuda":
        rivals |= _semi_structured(weight, x)
    return Case(f"{label} {outputs}x{inputs}, {many(rows)} {str(dtype)[6:]}", in_turn([partial(layer, x) for layer in layers]),
                lambda: F.linear(x.float(), weight.float()), rivals, read + rows * (inputs + outputs) * dtype.itemsize, rows * kept, turns)


def _mask(kind: str, outputs: int, inputs: int, density: float, r: int, c: int, device: torch.device) -> Tensor:
    if kind == "2:4":
        return (torch.rand((outputs, inputs // 4, 4), dtype=torch.float32, device=device).argsort(-1) < 2).view(outputs, inputs)
    kept = torch.rand((-(-outputs // r), inputs // c), dtype=torch.float32, device=device) < density
    return kept.repeat_interleave(r, 0)[:outputs].repeat_interleave(c, 1)


def _semi_structured(weight: Tensor, x: Tensor) -> dict[str, Callable[[], Any]]:
    """torch's own 2:4: cuSPARSELt as it is and with the transposition fused and the algorithm searched for, and CUTLASS."""
    from torch.sparse import SparseSemiStructuredTensor as Stored
    from torch.sparse import to_sparse_semi_structured

    found: dict[str, Callable[[], Any]] = {}
    for name, cutlass, searched in (("cuSPARSELt 2:4", False, False), ("cuSPARSELt 2:4, searched", False, True), ("CUTLASS 2:4", True, False)):
        try:
            Stored._FORCE_CUTLASS, Stored._FUSE_TRANSPOSE = cutlass, searched
            packed = to_sparse_semi_structured(weight)
            if searched:
                packed.alg_id_cusparselt = torch._cslt_sparse_mm_search(packed.packed, x.t(), transpose_result=True)
            F.linear(x, packed)
            found[name] = partial(F.linear, x, packed)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            print(f"  {name}: {str(error).splitlines()[0]}")
    return found


def attend_case(device: torch.device, batch: int, heads: int, groups: int, queries: int, keys: int, width: int, share: float,
                block: int = 64, dtype: torch.dtype = BF16) -> Case:
    """Causal; each block of queries reads the diagonal and some of the blocks before it."""
    block_q = block if queries > 1 else 1
    seen = _causal_blocks(heads if queries > 1 else groups, queries, keys, block_q, block, share, device)
    counts = seen.sum(-1).int()
    order = torch.where(seen, torch.arange(seen.shape[-1], device=device), seen.shape[-1]).sort(-1).values
    indices = order[..., : int(counts.max())].clamp(max=seen.shape[-1] - 1).int()
    listed = float(counts.sum()) * batch * block
    read = listed * 2 * width * dtype.itemsize
    sizes = ((heads, queries), (groups, keys), (groups, keys))
    sets = [[numbers(device, batch, n, length, width, dtype=dtype) for n, length in sizes]
            for _ in range(1 if queries > 1 else copies(device, read, 2 * batch * groups * keys * width * dtype.itemsize))]
    made = [calls.Call(*given, indices[None], counts[None], None, None, None, None, block_q, block, True, None) for given in sets]
    query, key, value = (given.float() for given in sets[1 % len(sets)])
    name = f"attention {batch}x{heads}/{groups} heads, {queries} of {keys}, width {width}, {share:.0%} of blocks of {block} {str(dtype)[6:]}"
    rivals = {name: in_turn([partial(rival, *given) for given in sets]) for name, rival in _dense_attention(queries > 1, device).items()}
    if queries > 1 and device.type == "cuda":
        rivals |= _flex(*sets[0], seen, block)
    return Case(name, in_turn([lambda call=call: attend.run(call)[0] for call in made]),
                lambda: attend_blocks.reference(query, key, value, indices[None], counts[None], block_q=block_q, block_k=block, causal=True)[0],
                rivals, read, 2 * listed * block_q * width * (1 if queries > 1 else heads // groups), len(sets), ("FlexAttention",))


def _dense_attention(causal: bool, device: torch.device) -> dict[str, Callable[..., Any]]:
    """torch's, as it chooses, and by each of its two fast ways."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    chosen = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    ways = {"FlashAttention dense": SDPBackend.FLASH_ATTENTION, "cuDNN dense": SDPBackend.CUDNN_ATTENTION} if device.type == "cuda" else {}
    return {"SDPA dense": chosen, **{name: partial(run, backend) for name, backend in ways.items()}}


def _causal_blocks(heads: int, queries: int, keys: int, block_q: int, block: int, share: float, device: torch.device) -> Tensor:
    """bool [heads, query blocks, key blocks]."""
    rows, columns = -(-queries // block_q), -(-keys // block)
    last = ((torch.arange(rows, device=device) + 1) * block_q - 1 + keys - queries).clamp(max=keys - 1) // block
    column = torch.arange(columns, device=device)
    seen = torch.rand((heads, rows, columns), dtype=torch.float32, device=device) < share
    return (seen & (column <= last[:, None])) | (column == last[:, None])


def _flex(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, block: int) -> dict[str, Callable[[], Any]]:
    """FlexAttention with the same blocks."""
    try:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        counts = seen.sum(-1, dtype=torch.int32)[None]
        order = torch.argsort(seen.int(), dim=-1, descending=True, stable=True).int()[None]
        mask = BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=(block, block), mask_mod=lambda b, h, q, k: q >= k)
        compiled = torch.compile(flex_attention)
        compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return {"FlexAttention": lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)}
    except Exception as error:  # noqa: BLE001  a rival that cannot run here is left out, and named
        print(f"  FlexAttention: {str(error).splitlines()[0]}")
        return {}


def experts_case(device: torch.device, count: int, inputs: int, hidden: int, rows: int, each: int, dtype: torch.dtype = BF16) -> Case:
    x, gate, up = numbers(device, rows, inputs, dtype=dtype), *(numbers(device, count, hidden, inputs, scale=0.02, dtype=dtype) for _ in range(2))
    down, weights = numbers(device, count, inputs, hidden, scale=0.02, dtype=dtype), torch.rand((rows, each), dtype=torch.float32, device=device)
    one = 3 * inputs * hidden * dtype.itemsize
    turns = copies(device, each * one, 0) if rows == 1 else 1
    choices = [torch.rand((rows, count), dtype=torch.float32, device=device).topk(each).indices for _ in range(turns)]
    layer = bound(experts, "experts_ffn", {"gate": gate, "up": up, "down": down}, {"activation": "silu"}, dtype, rows)
    rivals: dict[str, Callable[..., Any]] = {"loop": _looped}
    if rows > 1 and device.type == "cuda":
        import gpu_triton

        rivals |= {"torch._grouped_mm": _grouped, **gpu_triton.rivals(x, choices[0], weights, gate, up, down)}
    first = choices[1 % turns]
    name = f"{each} of {count} experts {inputs}x{hidden}, {many(rows)} {str(dtype)[6:]}"
    return Case(name, in_turn([partial(layer, x, c, weights) for c in choices]),
                lambda: experts_ffn.reference(x.float(), first, weights, gate.float(), up.float(), down.float(), activation="silu"),
                {name: in_turn([partial(rival, x, c, weights, gate, up, down) for c in choices]) for name, rival in rivals.items()},
                float(first.unique().numel()) * one, rows * each * 3 * inputs * hidden, turns, ("loop",))


def _looped(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for expert in range(gate.shape[0]):
        row, place = torch.where(chosen == expert)
        part = x[row]
        made = F.linear(F.silu(F.linear(part, gate[expert])) * F.linear(part, up[expert]), down[expert])
        y.index_add_(0, row, (made * weights[row, place, None]).to(x.dtype))
    return y


def _grouped(x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    by_expert, order = chosen.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(1, gate.shape[0] + 1, device=x.device)).int()
    part = x[order // chosen.shape[1]]
    product = torch._grouped_mm
    made = product(F.silu(product(part, gate.mT, offs=ends)) * product(part, up.mT, offs=ends), down.mT, offs=ends)
    return torch.zeros_like(x).index_add_(0, order // chosen.shape[1], (made * weights.reshape(-1)[order, None]).to(x.dtype))


def small() -> Iterator[Make]:
    """Odd shapes, for correctness alone."""
    for dtype in (BF16, torch.float16, torch.float32):
        for rows in (1, 3):
            yield of(gather_case, 1000, 520, 0.5, rows, dtype, scaled=rows == 3)
            yield of(sparse_case, "rows", 264, 776, rows, 0.2, dtype=dtype)
        yield of(experts_case, 6, 136, 200, 1, 2, dtype)
    for dtype in (BF16, torch.float16):
        for rows in (2, 40, 300):
            yield of(sparse_case, "2:4", 328, 576, rows, dtype=dtype)
            yield from (of(sparse_case, "blocks", 264, 576, rows, 0.3, r, c, dtype=dtype) for r, c in SMALL_BLOCKS)
            yield of(experts_case, 6, 136, 200, rows, 2, dtype)
        yield from (of(attend_case, 2, 4, 2, q, 777, width, 0.5, dtype=dtype) for q in (777, 1) for width in (64, 128))
    yield of(ffn_case, 1032, 776, 0.05)


def timed() -> Iterator[Make]:
    """What is measured, the most telling first."""
    for density in (0.5, 0.1):
        yield from (of(gather_case, *shape, density) for shape in ((4096, 11008), (8192, 28672)))
    yield of(sparse_case, "2:4", 11008, 4096, 4096)
    yield of(sparse_case, "2:4", 11008, 4096, 512)
    yield from (of(sparse_case, "blocks", 4096, 4096, rows, 0.1, r, c) for r, c in ((64, 1), (16, 1), (64, 64)) for rows in (4096, 512))
    yield of(attend_case, 1, 32, 8, 8192, 8192, 128, 0.1)
    yield of(attend_case, 1, 32, 8, 8192, 8192, 128, 0.1, 128)
    yield of(attend_case, 8, 32, 8, 1, 32768, 128, 0.1)
    yield from (of(experts_case, 8, 4096, 14336, rows, 2) for rows in (1, 64, 4096))
    yield from (of(experts_case, 64, 2048, 1408, rows, 6) for rows in (1, 4096))
    yield of(ffn_case, 4096, 11008, 0.5)
    yield from (of(sparse_case, kind, 11008, 4096, 1, density, r) for kind, density, r in (("2:4", 0.5, 1), ("rows", 0.1, 1), ("blocks", 0.1, 64)))
    yield of(attend_case, 1, 32, 8, 16384, 16384, 128, 0.1)
