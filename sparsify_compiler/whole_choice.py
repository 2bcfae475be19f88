"""Whether one library takes the calls of a model that was captured whole: built, compared with its kernels one by one, timed against them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .call import Flattener, call_arguments
from .capture_verify import close
from .compiled import CompiledModel
from .errors import ModelError
from .measure import Timing, interleave, undisturbed
from .program import InputSpec, Program, TensorSpec
from .step_choice import refused
from .target import Target
from .whole_call import PARTS, WholeCall, build_call, tensors_of

LIBRARY = "one library"
CALLS = ("auto", "library", "parts")
WORTH = 1 << 24     # bytes of weights from which a library is made without being asked for
ROOM = 4            # what is held for the library alone is at most such a part of all that the model holds
CLEARLY = 0.98      # of the time kernel by kernel: less than that is no gain that can be told from noise


@dataclass(frozen=True)
class Choice:
    """A WholeCall where it is faster, and what to say of it in the report."""

    whole: WholeCall | None
    told: str


def is_wanted(calls: str, program: Program, size: int) -> bool:
    """Is a library to be tried for a program with weights of so many bytes? `calls` is one of CALLS."""
    kernels = any(node.meta.get("kernel") is not None for _, node in program.nodes())
    return program.skeleton is None and kernels and (calls == "library" or (calls == "auto" and size >= WORTH))


def why_not(program: Program) -> str:
    """What to say of a program for which a library was asked and none is tried."""
    return f"{PARTS}: " + ("it was captured in parts, with Python between them" if program.skeleton is not None else "no layer of it has a kernel")


def choose_call(compiled: CompiledModel, example: Any, target: Target, room: int | None = None) -> Choice:
    """Build the library of a compiled model, and keep it where it says the same in less time.

    example  the inputs that latency is measured on
    room     bytes that may be held for it alone; by default a quarter of what the model holds
    """
    started = time.perf_counter()
    try:
        spec = compiled.program.regions[""].spec
        inputs = Flattener(spec)(*call_arguments(example))
        most = _sizes(spec, inputs)
        library, rows = build_call(compiled.program, target, most, int(compiled.resident_bytes() / ROOM) if room is None else room)
        built = time.perf_counter() - started
        exact = WholeCall(library, spec, {name: (size, size) for name, size in most.items()}, rows)
        times = _compared(compiled, exact, spec, inputs)
        if not _is_faster(times):
            return Choice(None, f"{PARTS}: {_times(times)}")
        least = _least(compiled, WholeCall(library, spec, {name: (1, size) for name, size in most.items()}, rows), spec, inputs, most)
    except Exception as error:  # noqa: BLE001 — few have asked for it, and whatever goes wrong, of whatever model, it runs without
        return Choice(None, refused(PARTS, "library", error))
    sizes = {name: (least.get(name, size), size) for name, size in most.items()}
    own = library.own_bytes / 2**20
    ranges = "".join(f", {name} {low} to {high}" if low < high else f", {name} {high}" for name, (low, high) in sizes.items())
    told = f"{LIBRARY}{ranges}: {_times(times)}; built in {built:.0f} s, {own:.1f} MB of weights of its own"
    return Choice(WholeCall(library, spec, sizes, rows), told)


def _sizes(spec: InputSpec, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Dynamic dimensions as they are in a call."""
    return {size: given for leaf, tensor in zip(tensors_of(spec), inputs, strict=True)
            for size, given in zip(leaf.shape, tensor.shape, strict=True) if isinstance(size, str)}


def _least(compiled: CompiledModel, whole: WholeCall, spec: InputSpec, inputs: Sequence[Tensor], most: Mapping[str, int]) -> dict[str, int]:
    """The smallest sizes that there are, where the library is right and faster for them too, as it then is between: less time goes into arithmetic.
    Nothing where it is not."""
    least = {name: max(1, spec.ranges.get(name, (1, None))[0]) for name in most}
    small = [_cut(tensor, leaf, least) for leaf, tensor in zip(tensors_of(spec), inputs, strict=True)]
    try:
        return least if least != most and _is_faster(_compared(compiled, whole, spec, small)) else {}
    except ModelError:
        return {}


def _cut(tensor: Tensor, leaf: TensorSpec, least: Mapping[str, int]) -> Tensor:
    for axis, size in enumerate(leaf.shape):
        if isinstance(size, str):
            tensor = tensor.narrow(axis, 0, least[size])
    return tensor.contiguous()


def _compared(compiled: CompiledModel, whole: WholeCall, spec: InputSpec, inputs: Sequence[Tensor]) -> dict[str, Timing]:
    """Times of both ways of one call. Raises ModelError where they do not say the same."""
    flat: Callable[..., Sequence[Any]] = compiled.flat
    usual, found = flat(*inputs), whole(inputs)
    if found is None:
        raise ModelError("its example inputs are none that a library takes")
    if len(found) != len(usual) or not all(close(a, b) for a, b in zip(usual, found, strict=True)):
        raise ModelError("its library says something else than its kernels one by one")
    forms: dict[str, Callable[[], object]] = {PARTS: lambda: flat(*inputs), LIBRARY: lambda: whole(inputs)}
    return undisturbed(lambda: interleave(forms, rounds=31, at_most=1.0, repeats=2), 3)[0]


def _is_faster(times: Mapping[str, Timing]) -> bool:
    return times[LIBRARY].median < CLEARLY * times[PARTS].median


def _times(times: Mapping[str, Timing]) -> str:
    kept, other = (LIBRARY, PARTS) if _is_faster(times) else (PARTS, LIBRARY)
    return f"a call takes {times[kept].median:.2f} ms, and {times[other].median:.2f} ms {'' if other is PARTS else 'by '}{other}"
