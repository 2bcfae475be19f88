"""Did a pass keep what it promised? Runs both Programs and compares outputs; compares the zeros of every weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .call import call_arguments, instantiate
from .errors import VerifyError
from .fold import evaluate, is_constant, masks
from .operands import packed_operator, packed_weight
from .passes_api import Preserves
from .program import Program, Region, TensorSpec
from .verify import signature_of, verify

# Largest difference of an output, relative to its largest magnitude: float reassociation over a whole network, and no more.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Example = tuple[Any, ...] | Mapping[str, Any]


def check_preserves(before: Program, after: Program, example: Example | None, preserves: Preserves) -> None:
    """Raises VerifyError unless `after` keeps the signature of `before`, and its masks or values where `preserves` says so."""
    verify(after, signature_of(before))
    if preserves in (Preserves.MASK, Preserves.VALUES):
        compare_zeros(before, after)
    if preserves is Preserves.VALUES:
        compare_outputs(outputs(before, example), outputs(after, example))


def outputs(program: Program, example: Example | None, seed: int = 0) -> list[Any]:
    """The flat outputs of the Program on the example inputs; without any, of every region on inputs made from its input spec."""
    with torch.no_grad():
        if example is None:
            made = [region.module(*sample_inputs(region, seed)) for region in program.regions.values()]
            return pytree.tree_leaves(made)
        args, kwargs = call_arguments(example)
        return pytree.tree_leaves(instantiate(program)(*args, **kwargs))


def compare_outputs(before: Sequence[Any], after: Sequence[Any], where: str = "") -> None:
    """Raises VerifyError that names the output that differs most, by how much, and how much its dtype allows."""
    if len(before) != len(after):
        raise VerifyError(f"there were {len(before)} outputs, now {len(after)}", where=where)
    worst = (0.0, "")
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        allowed = TOLERANCE.get(old.dtype, 0.0) if isinstance(old, Tensor) else 0.0
        found = difference(old, new)
        if not found <= allowed:
            excess = found / allowed if allowed else float("inf")
            worst = max(worst, (excess, f"output {index} differs by {found:.2g} of its largest magnitude; {allowed:.2g} is allowed"))
    if worst[1]:
        raise VerifyError(worst[1], where=where, hint="SPARSIFY_DEBUG=numbers,fuel=<k> finds the rewrite that did it")


def difference(old: Any, new: Any) -> float:
    """Largest |old - new| relative to the largest finite |old|; infinite for another shape, dtype, or place of a NaN or infinity."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return 0.0 if old == new else float("inf")
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if not old.is_floating_point():
        return 0.0 if torch.equal(old, new) else float("inf")
    a, b = old.double(), new.double()
    special = ~(a.isfinite() & b.isfinite())
    if not torch.equal(a[special].nan_to_num(nan=0.125), b[special].nan_to_num(nan=0.125)):
        return float("inf")
    a, b = a[~special], b[~special]
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    scale = float(a.abs().max())
    return float((a - b).abs().max()) / scale if scale > 0 else float("inf")


def compare_zeros(before: Program, after: Program) -> None:
    """Raises VerifyError where a weight that a mask had set to zero is not zero any more, or its layer cannot be found."""
    new, old = dict(masked_weights(after, every=True)), masked_weights(before)
    merged = [weight for path, weight in masked_weights(after) if path not in dict(old)]  # a layer may have become a part of another
    for path, weight in old:
        if path not in new:
            if any(w.shape == weight.shape and not bool(((weight == 0) & (w != 0)).any()) for w in merged):
                continue
            raise VerifyError("had a mask, and its layer is gone", where=path)
        if new[path].shape != weight.shape or bool(((weight == 0) & (new[path] != 0)).any()):
            raise VerifyError("zeros of the mask were lost", where=path)


def masked_weights(program: Program, every: bool = False) -> list[tuple[str, Tensor]]:
    """(module path, weight as its layer uses it) of every masked or packed layer; with `every`, of dense layers too."""
    found: list[tuple[str, Tensor]] = []
    for region, node in program.nodes():
        weight = node.kwargs.get("weight")
        path = str(node.meta.get("path") or node.name)
        if packed_operator(node):
            found.append((path, packed_weight(region, node)))
        elif isinstance(weight, fx.Node) and is_constant(weight) and (every or masks(region, weight)):
            found.append((path, evaluate(region, weight)))
    return found


def sample_inputs(region: Region, seed: int = 0) -> list[Tensor]:
    """Inputs that the region's spec allows: normal floats; integers 0 and 1, never all 0 in a row, so that a mask of them masks no row away."""
    generator = torch.Generator().manual_seed(seed)
    return [_sample(leaf, region, generator) for leaf in region.spec.leaves if isinstance(leaf, TensorSpec)]


def _sample(spec: TensorSpec, region: Region, generator: torch.Generator) -> Tensor:
    shape = [d if isinstance(d, int) else _size(region.spec.ranges.get(d, (1, None))) for d in spec.shape]
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(spec.dtype)
    values = torch.randint(0, 2, shape, generator=generator)
    if values.dim():
        values[..., 0] = 1
    return values.to(spec.dtype)


def _size(limits: tuple[int, int | None]) -> int:
    low, high = limits
    return max(low, min(3, high if high is not None else 3))
