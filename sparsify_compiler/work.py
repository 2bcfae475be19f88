"""Work: what one call of an op has to do, by sizes alone; and what its kernels take for it, measured here or predicted for any machine.

    work = Work.of((3072, 768), rows=128, structure=Structure.parse("16x1"), density=0.2)
    measure(work)           # {"dense eager": 1.1e-3, "dense packed": 9e-4, "bsr_strips4x4": 3e-4}, seconds
    predict(work, "cortex-a76")     # likewise, within microseconds and without that machine

A plan asks this of hundreds of pairs of a layer and a choice, before any weight is pruned: weights are random, of the structure in question.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from . import catalog
from .cost import Cost, cost_of
from .errors import InputError, nearest
from .target import Target, fingerprint, host

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .cost_models.predict import Seconds

VERSION = "4"           # of what a measured number means; part of every key
BETWEEN = 1 << 26       # bytes: about what the other layers of a middle-sized model read before a layer's turn comes again
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}    # bytes
DENSE = "dense"         # what the name of every dense form begins with
SIZES = {"linear": ("M", "N", "K"), "conv2d": ("M", "N", "K", "taps", "read", "written")}     # of layers that are computed in full
ROUNDS = 15
SECONDS = 3.0           # of measuring one work, at the most


@dataclass(frozen=True)
class Work:
    """One call of an op.

    op       a name of `catalog.names("cost")`: "linear", "linear_bsr", "select_linear", "select_ffn", ...
    sizes    numbers by the names of cost_models/symbols.py (M rows, N outputs, K inputs, density, r, c, n, m, hidden, ...), sorted by name
    dtype    of x, of the weights and of the result
    between  bytes that the model reads between two calls: what of the weight is still in a cache follows from it; 0 for a tight loop
    """

    op: str
    sizes: tuple[tuple[str, float], ...]
    dtype: str = "float32"
    between: int = BETWEEN

    def __post_init__(self) -> None:
        if self.op not in catalog.names("cost"):
            raise InputError(f"unknown op {self.op!r}", where="work", hint=nearest(self.op, catalog.names("cost")))
        if self.dtype not in DTYPES:
            raise InputError(f"no kernels compute in {self.dtype!r}", where="work", hint=nearest(self.dtype, DTYPES))
        negative = [name for name, value in self.sizes if not value >= 0]
        if negative or self.between < 0:
            raise InputError(f"{', '.join(negative) or 'between'} is below 0 or no number", where=f"work of {self.op}")

    @classmethod
    def make(cls, op: str, dtype: str = "float32", between: int = BETWEEN, **sizes: float) -> Self:
        """Of an op by name: Work.make("select_linear", M=1, N=768, K=3072, density=0.4)."""
        return cls(op, tuple(sorted(sizes.items())), str(dtype).removeprefix("torch."), between)

    @classmethod
    def of(cls, shape: tuple[int, int], rows: int, structure: Any = None, density: float = 1.0, dtype: Any = "float32",
           between: int = BETWEEN) -> Self:
        """Of a linear layer with a weight of `shape` [N, K] on so many rows, with a weight of this structure and density; None: dense.

        structure  a Structure, whose own density counts where it fixes one; the format is what `pack` would take
        """
        return cls.stored("linear", {"M": rows, "N": shape[0], "K": shape[1]}, structure, density, dtype, between)

    @classmethod
    def stored(cls, op: str, sizes: Mapping[str, float], structure: Any = None, density: float = 1.0, dtype: Any = "float32",
               between: int = BETWEEN) -> Self:
        """Of "linear" or "conv2d" of these sizes, with a weight of this structure and density in the format that `pack` would take; None: dense."""
        if structure is None:
            return cls.make(op, dtype, between, **sizes)
        kept = density if structure.density is None else structure.density
        made = [cls.make(f"{op}_{name}", dtype, between, **sizes, density=kept, **attributes) for name, attributes in structure.formats()]
        return min(made, key=lambda work: work.cost.bytes)

    @property
    def values(self) -> dict[str, float]:
        """Every number that a formula may ask for: the sizes, the density that n:m fixes, and the bytes of an element."""
        sizes, size = dict(self.sizes), DTYPES[self.dtype]
        fixed = {"density": sizes["n"] / sizes["m"]} if sizes.get("m") and "n" in sizes else {}
        return {"value_bytes": size, "x_bytes": size, **sizes, **fixed}

    @property
    def cost(self) -> Cost:
        """Operations, and bytes read and written, each once, by the op's formulas. Raises InputError where a size is missing."""
        try:
            return cost_of(self.op, self.values)
        except KeyError as error:
            raise InputError(f"the size {error.args[0]} is missing", where=f"work of {self.op}", hint="see cost_models/symbols.py") from error

    @property
    def dense(self) -> Work:
        """The same layer computed in full."""
        for op, names in SIZES.items():
            if self.op.startswith(f"{op}_") or (op, self.op) == ("linear", "select_linear"):
                return replace(self, op=op, sizes=tuple((name, value) for name, value in self.sizes if name in names))
        return replace(self, sizes=tuple((name, 1.0 if name == "density" else value) for name, value in self.sizes))


def is_dense(form: str) -> bool:
    """Is this key of measure() and predict() one of the dense forms?"""
    return form.startswith(DENSE)


def predict(work: Work, target: Any = None, again: float | None = None) -> dict[str, float]:
    """Seconds of one call in each form that the machine has, dense ones included, by the names that lowering gives them: formulas, no kernel runs.

    target  a name of machines.names(), a Target, or a Machine; None: this machine
    again   bytes that are read between two calls of the same kernel, where layers of one kind share it; None: as many as work.between
    Raises InputError for an op that no formula computes or a size that is missing, TargetError for a machine of which nothing is known.
    """
    return {name: parts.total for name, parts in parts_of(work, target, again).items()}


def parts_of(work: Work, target: Any = None, again: float | None = None) -> dict[str, Seconds]:
    """The same in parts: what calling, computing and waiting for the weight take."""
    from . import machines

    machine = machines.machine(target)
    try:
        made = {form.name: _model().seconds(form, work.values, machine, work.between, again=again) for form in _forms(work, machine)}
    except KeyError as error:
        raise InputError(f"the size {error.args[0]} is missing", where=f"work of {work.op}", hint="see cost_models/symbols.py") from error
    if not made:
        raise InputError(f"no formula says how long {work.op} takes in {work.dtype}", where="work",
                         hint="linear layers, convolutions, gated FFNs, experts, attention and elementwise ops have one, in some dtypes")
    return made


def is_predicted(work: Work, target: Any = None) -> bool:
    """Is there a formula for what this op takes on the machine? Raises TargetError for a machine of which nothing is known."""
    from . import machines

    return bool(_forms(work, machines.machine(target)))


def _forms(work: Work, machine: Any) -> list[Any]:
    """Those whose costs are known, be it from another processor."""
    model = _model()
    return [form for form in model.forms(work.op, work.values, work.dtype, machine) if model.is_fitted(form, machine)]


def _model() -> Any:
    return catalog.get("cost model", "predict")


def measure(work: Work, target: Target | None = None) -> dict[str, float]:
    """Seconds of one call in each form that can run here, dense ones included, by the names that lowering gives them.

    Forms take turns in one process, with torch's current number of threads. Between two calls of a form as many other bytes are read as work.between
    says, and x is written. Kept on disk, by content: the work, the machine, its threads, versions of torch and TVM, the text of the kernels.
    Raises InputError for an op that cannot be made up from its sizes, and TargetError for a machine that is not this one.
    """
    from .codegen import cache
    from .far import require_here

    target = require_here(target or host(), "predict() estimates")
    key = _key(work, target)
    found: dict[str, float] = json.loads(cache.read_or_build(key, lambda: json.dumps(_measured(work, target)).encode()))
    return found


def _key(work: Work, target: Target) -> str:
    import hashlib

    import torch

    from .codegen import build

    about = [VERSION, repr(work), fingerprint(), target.features, torch.get_num_threads(), torch.__version__, build.version(), build.sources()]
    return f"timing-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40]}"


def _measured(work: Work, target: Target) -> dict[str, float]:
    import torch

    from .measure import interleave, undisturbed
    from .work_sample import forms_of

    with torch.inference_mode():
        forms, x = forms_of(work, target)
        displace = others(work.between, x)
        timings, _ = undisturbed(lambda: interleave(forms, rounds=ROUNDS, at_most=SECONDS, repeats=2, before=displace))
    return {name: timing.median / 1e3 for name, timing in timings.items()}


def others(between: int, x: Any) -> Callable[[Callable[[], object]], object]:
    """What happens in a model between two calls of a form: others read so many bytes, and the one before it writes x."""
    import torch

    others = torch.zeros(between // 4, dtype=torch.float32)

    def run(form: Callable[[], object]) -> None:
        form()
        others.sum()
        x.add_(0)

    return run
